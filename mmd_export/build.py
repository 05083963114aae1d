"""The pipeline on one screen: checkpoint -> plan -> program -> artefact -> bundle, measured before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from mmd_export.bundle import (
    BatchSpec,
    Bundle,
    CheckpointRef,
    DecoderInfo,
    DeferredInfo,
    GraphInfo,
    ManifestDraft,
    Measured,
    TensorSpec,
    require_free,
    write_bundle,
)
from mmd_export.card import model_card, with_lineage
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.condition_files import with_examples
from mmd_export.conditions import Condition
from mmd_export.decoder import decoded_shape
from mmd_export.errors import NotAvailableError, UsageError, one_line
from mmd_export.folders import scratch_folder
from mmd_export.heap import release_heap
from mmd_export.measured import log_beside, measured
from mmd_export.network_options import AS_IT_IS, NetworkOptions
from mmd_export.plan import StepPlan
from mmd_export.plan_options import PlanOptions
from mmd_export.program import SamplerProgram, export_program
from mmd_export.reference import golden_arrays, takes
from mmd_export.runtime import ChainSession, RunOptions
from mmd_export.target_options import DEFAULTS, TargetOptions, flag
from mmd_export.targets import (
    ChecksImages,
    ChecksOptions,
    Compiled,
    CompileOptions,
    DeferrableTarget,
    Target,
    get_target,
    onnx,
    target_names,
)
from mmd_export.tolerance import artefact_tolerance
from mmd_export.tuned_precision import TunedPrecision
from mmd_runtime.registry import runtime_for

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = onnx.TARGET  # what a deferred bundle holds
MIN_GOLDEN = 4  # parity is measured on several noises


@dataclass(frozen=True)
class BuildOptions(PlanOptions):
    """What ``mmd-export build`` takes; names as on the command line.

    ``conditions``: ``name=FILE``, real values to set ranges and verify with.
    """

    model: str
    target: str
    out: Path
    precision: str = "fp32"
    batch: str = "1"
    output: str = "float32"
    overwrite: bool = False
    verify: bool = True
    form: str = "auto"
    decode: bool = False
    network: NetworkOptions = AS_IT_IS
    of_target: TargetOptions = DEFAULTS
    defer: bool = False
    auto_promote: bool = False
    conditions: tuple[str, ...] = ()


def build(options: BuildOptions, notify: Callable[[str], None] = lambda _: None) -> Bundle:
    """Make the bundle that ``options`` ask for; nothing appears at ``out`` unless its parity passes.

    ``notify`` hears each stage as it starts, and every warning. Raises MmdExportError of the right kind.
    """
    require_free(options.out, options.overwrite)
    prepared = _prepare(options, notify)
    if not options.auto_promote:
        return _pack(prepared, options, (), notify)
    prepared = replace(prepared, program=_translated(prepared.program))
    return _pack(prepared, options, _promote(prepared, options, notify), notify)


@dataclass(frozen=True)
class _Prepared:
    """All that a target does not change."""

    target: Target
    batch: BatchSpec
    program: SamplerProgram
    weight_bytes: int
    golden: dict[str, NDArray[Any]]
    draft: ManifestDraft
    tuned: TunedPrecision | None
    lineage: Mapping[str, str]


def _prepare(options: BuildOptions, notify: Callable[[str], None]) -> _Prepared:
    """Checkpoint, plan, reference and program."""
    batch, target = BatchSpec.parse(options.batch), usable_target(options)
    require_batches(target, batch)
    notify("reading the checkpoint")
    checkpoint = load_checkpoint(options.model, network=options.network).ending_in(image=options.decode)
    checkpoint = replace(
        checkpoint, conditions=with_examples(checkpoint.conditions, options.conditions, checkpoint.name)
    )
    static = batch.smallest if batch.is_static else None
    _require_images(options, target, checkpoint, static)
    for warning in checkpoint.warnings:
        notify(f"warning: {warning}")
    tuned = checkpoint.tuned_precision
    if tuned and (said := tuned.warning(checkpoint.name, target.name, options.precision)):
        notify(f"warning: {said}")
    if said := _ranges_made_up(options.precision, target, checkpoint.conditions):
        notify(f"warning: {said}")
    plan = checkpoint.plan_for(**options.wanted)
    if checkpoint.latent and plan.clip is not None:
        notify(
            f"warning: the scheduler clamps the clean guess to {plan.clip:g}, and these are latents; "
            "set clip_sample false in its config unless the model was trained so"
        )
    notify("running the float64 reference")
    golden = _golden(checkpoint, plan, golden_count(batch), options.output)
    weight_bytes = sum(weight.nbytes for weight in checkpoint.denoiser.state_dict().values())
    release_heap(weight_bytes)
    notify("capturing one network call")
    program = export_program(
        checkpoint.denoiser, plan, checkpoint.shape, static, checkpoint.conditions, checkpoint.decoder
    )
    draft = _draft(options, checkpoint, program, batch, target)
    return _Prepared(target, batch, program, weight_bytes, golden, draft, tuned, checkpoint.lineage)


def _golden(checkpoint: Checkpoint, plan: StepPlan, count: int, output: str) -> dict[str, NDArray[Any]]:
    """The reference's arrays; UsageError for a network of whole timesteps, where the plan has others."""
    try:
        return golden_arrays(checkpoint, plan, count, output)
    except (IndexError, RuntimeError) as error:
        fraction = next((timestep for timestep in plan.timesteps if not float(timestep).is_integer()), None)
        if fraction is None or takes(checkpoint, fraction) or not takes(checkpoint, round(fraction)):
            raise
        raise UsageError(
            f"model {checkpoint.name} fails at timestep {fraction:g} of the plan: {one_line(error)}; choose whole ones "
            "with --timesteps, or another --sampler"
        ) from error


def _ranges_made_up(precision: str, target: Target, conditions: Sequence[Condition]) -> str:
    """What the user should hear where the values that set the ranges of activations are not real; else nothing."""
    made_up = [each.name for each in conditions if each.made_up]
    if not made_up or "calibration" not in target.options:
        return ""
    from mmd_export.precision.formats import GRIDS

    if (grid := GRIDS.get(precision)) is None or not grid.activations:
        return ""
    return (
        f"the {precision} ranges are those of unit normal numbers in {', '.join(made_up)}, far from real "
        f"ones; give them with --condition {made_up[0]}=FILE"
    )


def _pack(prepared: _Prepared, options: BuildOptions, kept: tuple[str, ...], notify: Callable[[str], None]) -> Bundle:
    """Compile, measure and publish; ``kept``: values of a call whose operators stay float32."""
    target, draft = prepared.target, prepared.draft

    def compile_into(folder: Path) -> ManifestDraft:
        notify(f"compiling for {draft.format}, to be finalized for {target.name}" if options.defer
               else f"compiling for {target.name}")  # fmt: skip
        chosen = CompileOptions(
            options.precision, options.output, options.form, prepared.batch, options.of_target, notify,
            log_beside(options.out), prepared.tuned, kept,
        )  # fmt: skip
        compiled = (GRAPH if options.defer else target).compile(prepared.program, folder, chosen)
        if options.defer and isinstance(target, DeferrableTarget):
            target.require_buildable(folder / GRAPH.artefact)
        return _with_facts(draft, compiled)

    def measure(bundle: Bundle) -> Measured:
        if not options.verify:
            return Measured(with_lineage(model_card(bundle.manifest), prepared.lineage))
        notify("verifying the artefact")
        release_heap(prepared.weight_bytes)
        note = f"; float32 for parity: {', '.join(kept)}" if kept else ""
        other = "use --target onnx, or " if draft.format != GRAPH.format else ""
        moves = f"{other}make the bundle with --skip-verify and look into it with verify"
        found = measured(bundle, runtime_for(draft.format), note, moves)
        if found.unverified:
            notify(f"warning: not verified: {found.unverified}")
        return replace(found, card=with_lineage(found.card, prepared.lineage))

    card = with_lineage(model_card(draft), prepared.lineage)
    return write_bundle(options.out, draft, compile_into, prepared.golden, card, options.overwrite, measure)


def _translated(program: SamplerProgram) -> SamplerProgram:
    """The program, translated once for the trial, the search and the bundle."""
    from mmd_export.onnx_translate import translate

    return replace(program, translated=translate(program.step))


def _promote(prepared: _Prepared, options: BuildOptions, notify: Callable[[str], None]) -> tuple[str, ...]:
    """The values whose operators ``--auto-promote`` keeps in float32."""
    from mmd_export.onnx_calls import exact_calls, graph_spec, unrolled
    from mmd_export.precision.lower import lower
    from mmd_export.promote import promoted
    from mmd_runtime.onnxruntime import chain_session

    calls, spec = exact_calls(prepared.program), graph_spec(prepared.program, options.output)

    def lowered(kept: tuple[str, ...]) -> ir.Model:
        images = options.of_target.calibration
        return unrolled(
            lower(calls, options.precision, images, notify=notify, tuned=prepared.tuned, float32=frozenset(kept)), spec
        )

    def open_chain(bundle: Bundle, model: Any) -> ChainSession:
        return chain_session(bundle, RunOptions(), model)

    with scratch_folder() as scratch:
        trial = replace(options, out=scratch / "trial", verify=False, form="unrolled", overwrite=False)
        bundle = _pack(prepared, trial, (), notify)
        return promoted(bundle, lowered, open_chain, unrolled(calls, spec), notify)


def _require_promotable(options: BuildOptions, target: Target) -> None:
    """Raise unless there is a lower precision whose operators can be told apart."""
    if target.name != GRAPH.name:
        raise NotAvailableError(
            f"target {target.name} has no --auto-promote; {GRAPH.name} has, for {', '.join(GRAPH.precisions[1:])}"
        )
    if options.precision == "fp32":
        raise UsageError("--auto-promote keeps operators in float32, --precision is fp32; give a lower one")


def usable_target(options: BuildOptions) -> Target:
    """The target, if it is known, can build here and takes the options."""
    target = get_target(options.target)
    for name, value, known in (
        ("--precision", options.precision, target.precisions),
        ("--output", options.output, target.outputs),
        ("--form", options.form, ("auto", *target.forms)),
    ):
        if value not in known:
            missing = f"target {target.name} has no {name} {value}; it has {', '.join(known)}"
            raise NotAvailableError(missing) if value in _of_any_target(name) else UsageError(missing)
    options.of_target.require_known(target.name, target.options)
    if options.auto_promote:
        _require_promotable(options, target)
    deferrable = isinstance(target, DeferrableTarget)
    _require_taken(options, target)
    if options.defer and not deferrable:
        raise NotAvailableError(f"target {target.name} has no --defer, as it compiles here; leave it out")
    if not (found := (GRAPH if options.defer else target).availability()).available:
        later = "; or add --defer and finalize the bundle where it will run" if deferrable and not options.defer else ""
        raise NotAvailableError(f"target {target.name} cannot build here: {found.detail}; {found.install}{later}")
    if isinstance(target, ChecksOptions) and not options.defer:
        target.require_options(options.precision, options.of_target)
    if options.of_target.calibration is not None:
        from mmd_export.precision.formats import require_ranges

        require_ranges(options.precision, options.of_target.calibration)
    return target


def _require_taken(options: BuildOptions, target: Target) -> None:
    """Raise UsageError for an option that would change nothing."""
    device = options.of_target.device
    later = [name for name in ("cache", "memory_limit") if name in options.of_target.given]
    if options.defer and later:
        raise UsageError(f"--defer compiles nothing here; give {' and '.join(map(flag, later))} to finalize")
    if device is None or target.name not in (GRAPH.name, "openvino"):
        return
    if device != "cpu":
        raise UsageError(
            f"--device is {device!r}; without it, what {target.name} writes runs on any device; leave it out"
        )
    if options.precision != "fp32":
        raise UsageError(f"--device cpu is a form of fp32, --precision is {options.precision}; leave one of them out")


def _of_any_target(name: str) -> set[str]:
    """The values of an option that some target has."""
    values = {"--precision": "precisions", "--output": "outputs", "--form": "forms"}[name]
    return {value for target in target_names() for value in getattr(get_target(target), values)}


def require_batches(target: Target, batch: BatchSpec) -> None:
    """Raise NotAvailableError if one artefact of the target cannot take all these sizes."""
    if not batch.is_static and not target.several_batches:
        raise NotAvailableError(
            f"target {target.name} takes one batch size an artefact, --batch is {batch}; build once for each size"
        )


def _require_images(options: BuildOptions, target: Target, checkpoint: Checkpoint, batch: int | None) -> None:
    """Raise UsageError for bytes of a latent, and what the target raises for images that it cannot hold as bytes."""
    if options.output != "uint8":
        return
    decoder, shape = checkpoint.decoder, checkpoint.shape
    if checkpoint.latent and decoder is None:
        raise UsageError(f"{checkpoint.name} makes latents, --output uint8 is for images; add --decode")
    if isinstance(target, ChecksImages):
        target.require_images(batch, (shape if decoder is None else decoded_shape(decoder, shape))[0])


def golden_count(batch: BatchSpec) -> int:
    """How many golden images make every batch size run at least once, and several noises in all."""
    if batch.is_static:
        return batch.smallest * -(-MIN_GOLDEN // batch.smallest)
    sizes = batch.sizes or (batch.smallest, batch.largest)
    total = sum(sizes)
    return total * -(-MIN_GOLDEN // total)


def _draft(
    options: BuildOptions, checkpoint: Checkpoint, program: SamplerProgram, batch: BatchSpec, target: Target
) -> ManifestDraft:
    rows: int | Literal["batch"] = batch.smallest if batch.is_static else "batch"
    channels, height, width = checkpoint.shape
    image = (rows, channels, height, width)
    inputs = [TensorSpec(name="noise", dtype="float32", shape=image)]
    if program.plan.noisy_steps:
        inputs.append(TensorSpec(name="step_noise", dtype="float32", shape=(program.plan.noisy_steps, *image)))
    inputs += [
        TensorSpec(name=told.name, dtype=told.dtype, shape=(rows, *told.shape), below=told.below)
        for told in checkpoint.conditions
    ]
    uint8, decoder = options.output == "uint8", checkpoint.decoder
    channels, height, width = checkpoint.shape if program.decoder is None else program.decoder.shape
    sample = (rows, height, width, channels) if uint8 else (rows, channels, height, width)
    made = GRAPH if options.defer else target
    artefact = options.of_target.stored(target.artefact)
    recipe = DeferredInfo(format=target.format, artefact=artefact, options=options.of_target.recipe())
    return ManifestDraft(
        name=f"{checkpoint.name}-{program.plan.step_count}",
        target=target.name,
        format=made.format,
        artefact=made.artefact if options.defer else artefact,
        precision=options.precision,
        plan=program.plan.to_dict(),
        inputs=tuple(inputs),
        outputs=(TensorSpec(name="sample", dtype="uint8" if uint8 else "float32", shape=sample),),
        batch=batch,
        checkpoint=reference_to(checkpoint),
        decoder=None if decoder is None else DecoderInfo(**decoder.facts()),
        toolchain={},
        tolerance=artefact_tolerance(target.name, options.precision, program.plan.output_gain),
        graph=GraphInfo(nodes=0, unique_weight_bytes=0, op_counts={}),
        deferred=recipe if options.defer else None,
    )


def reference_to(checkpoint: Checkpoint) -> CheckpointRef:
    """What the manifest says of the checkpoint."""
    return CheckpointRef(
        name=checkpoint.name,
        sha256=checkpoint.sha256,
        licence=checkpoint.licence,
        options=dict(checkpoint.options),
    )


def _with_facts(draft: ManifestDraft, compiled: Compiled) -> ManifestDraft:
    """The draft with what only compiling tells."""
    facts = {
        "graph": GraphInfo(**compiled.graph),
        "toolchain": dict(compiled.toolchain),
        "hardware": None if compiled.hardware is None else dict(compiled.hardware),
    }
    return draft.model_copy(update=facts)
