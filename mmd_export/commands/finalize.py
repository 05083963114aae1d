"""``mmd-export finalize``: a deferred bundle compiled on the machine where it will run, verified and locked to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mmd_export.bundle import Bundle, DeferredInfo, ManifestDraft, Measured, require_free, write_bundle
from mmd_export.card import model_card, with_lineage_of
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.measured import log_beside, measured
from mmd_export.target_options import TargetOptions
from mmd_export.targets import CompileOptions, DeferrableTarget, get_target
from mmd_runtime.registry import runtime_for


@dataclass(frozen=True)
class FinalizeOptions:
    """What ``mmd-export finalize`` takes.

    Without ``out`` the new bundle takes the place of the old one, if it can be verified or ``verify`` is off.
    """

    bundle: Path
    out: Path | None = None
    overwrite: bool = False
    verify: bool = True
    memory_limit: int | None = None
    cache: Path | None = None


def finalize(options: FinalizeOptions, notify: Callable[[str], None] = lambda _: None) -> Bundle:
    """Compile the graph of a deferred bundle by its recipe; nothing changes unless all of it succeeds."""
    bundle = Bundle.open(options.bundle)
    recipe = bundle.manifest.deferred
    if recipe is None:
        raise UsageError(f"bundle {bundle.name} is not deferred, it holds {bundle.manifest.artefact}; use it as it is")
    out, overwrite = options.out or options.bundle, options.overwrite or options.out is None
    require_free(out, overwrite)
    target = _usable_target(bundle)
    if options.out is None and options.verify:
        _require_runtime(bundle, recipe)
    chosen = TargetOptions.from_recipe(recipe.options, options.cache, options.memory_limit)
    chosen.require_known(target.name, target.options)
    draft = _draft(bundle, recipe)

    def compile_into(folder: Path) -> ManifestDraft:
        notify(f"compiling for {target.name}")
        told = CompileOptions(draft.precision, batch=draft.batch, target=chosen, notify=notify, log=log_beside(out))
        facts = target.compile_onnx(bundle.artefact_path, folder, told)
        toolchain = {**draft.toolchain, facts.library: facts.version}
        return draft.model_copy(update={"hardware": facts.to_dict(), "toolchain": toolchain})

    def measure(made: Bundle) -> Measured:
        if not options.verify:
            return Measured(with_lineage_of(model_card(made.manifest), bundle.card))
        notify("verifying the artefact")
        moves = "make the bundle with --skip-verify in another --out and look into it with verify"
        found = measured(made, runtime_for(draft.format), moves=moves)
        if found.parity is None and options.out is None:
            raise NotAvailableError(_unverifiable(bundle, found.unverified))
        if found.unverified:
            notify(f"warning: not verified: {found.unverified}")
        return replace(found, card=with_lineage_of(found.card, bundle.card))

    card = with_lineage_of(model_card(draft), bundle.card)
    return write_bundle(out, draft, compile_into, _golden(bundle), card, overwrite, measure)


def _usable_target(bundle: Bundle) -> DeferrableTarget:
    """The target of the recipe, if it can build here."""
    target = get_target(bundle.manifest.target)
    if not isinstance(target, DeferrableTarget):
        raise UsageError(f"bundle {bundle.name} is deferred for {target.name}, which compiles no graph; build again")
    if not (found := target.compiler()).available:
        raise NotAvailableError(f"target {target.name} cannot build here: {found.detail}; {found.install}")
    return target


def _require_runtime(bundle: Bundle, recipe: DeferredInfo) -> None:
    """Raise NotAvailableError where nothing could verify the engine, before the long build."""
    runtime = runtime_for(recipe.format)
    if not (found := runtime.availability()).available:
        raise NotAvailableError(_unverifiable(bundle, f"runtime {runtime.name}: {found.detail}"))


def _unverifiable(bundle: Bundle, reason: str) -> str:
    """Why a verified graph is not replaced by an engine that nobody checked."""
    return (
        f"bundle {bundle.name}: its engine cannot be verified here ({reason}) and would take the place of a graph that "
        "was; name another folder with --out, or pass --skip-verify"
    )


def _draft(bundle: Bundle, recipe: DeferredInfo) -> ManifestDraft:
    """The manifest of the engine; what was measured on the graph is not known of it."""
    fields = {name: getattr(bundle.manifest, name) for name in ManifestDraft.model_fields}
    made = {"format": recipe.format, "artefact": recipe.artefact, "deferred": None, "parity": None}
    return ManifestDraft(**(fields | made))


def _golden(bundle: Bundle) -> dict[str, NDArray[Any]]:
    golden = bundle.golden()
    states = {f"state.{k}": state for k, state in enumerate(golden.states, start=1)}
    return {**golden.inputs, **states, "sample": golden.sample}
