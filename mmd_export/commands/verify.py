"""``mmd-export verify``: the parity ladder of a bundle, as far as this machine and what is at hand allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmd_export.bundle import Bundle, Golden
from mmd_export.commands.distribution import DistributionOptions, distribution_rung
from mmd_export.comparison import NO_LIMITS
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.measured import device_advice
from mmd_export.parity import Culprit, Limits, ParityReport, Rung, check_artefact, chunks, require_outputs
from mmd_export.runtime import RunOptions, Runtime, uninstalled
from mmd_runtime.registry import get_runtime, runtime_for, runtime_names

if TYPE_CHECKING:
    from mmd_export.checkpoint import Checkpoint
    from mmd_export.plan import StepPlan

BUILT_IN = ("digits",)  # known without importing torch; the same names as mmd_export.checkpoint.BUILT_IN
FRESH_SEED = 1  # of the noises that the golden file does not hold


@dataclass(frozen=True)
class Reference:
    """The checkpoint that a bundle was built from, and its plan."""

    checkpoint: Checkpoint
    plan: StepPlan


def usable_runtime(bundle: Bundle, name: str | None) -> Runtime:
    """The runtime of that name, or the first that fits the bundle's format; it must work here and fit."""
    artefact_format = bundle.manifest.format
    runtime = get_runtime(name) if name else runtime_for(artefact_format)
    if not opens(runtime, artefact_format):
        formats = ", ".join(runtime.formats)
        able = ", ".join(each for each in runtime_names() if artefact_format in get_runtime(each).formats)
        raise UsageError(
            f"bundle {bundle.name} holds {artefact_format}, runtime {runtime.name} opens {formats}; "
            f"{artefact_format} runs in {able}, or build with a --target that makes {formats}"
        )
    if not (found := runtime.availability()).available:
        raise NotAvailableError(f"runtime {runtime.name} does not work here: {found.detail}; {found.install}")
    return runtime


def opens(runtime: Runtime, artefact_format: str) -> bool:
    """Whether it runs artefacts of that format; the torch reference reads none, and so fits all."""
    return not runtime.formats or artefact_format in runtime.formats


def verify(
    bundle: Bundle,
    runtime_name: str | None = None,
    checkpoint: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
    *,
    limits: Limits | None = None,
    seed: int = FRESH_SEED,
    distribution: DistributionOptions | None = None,
    bisect: bool = False,
) -> ParityReport:
    """Rung 6 from the golden file; with ``checkpoint`` rungs 1 to 5 too, and rung 6 on noises of ``seed`` besides.

    ``distribution`` adds rung 7; ``bisect`` looks for the operator at fault where rung 6 fails.
    """
    runtime = usable_runtime(bundle, runtime_name)
    require_outputs(bundle, limits)
    reference, why_not = find_reference(bundle, checkpoint, notify)
    if bisect and reference is None:
        raise UsageError(f"--bisect compares with the checkpoint: {why_not}")
    if distribution is not None and reference is None and distribution.against is None:
        raise UsageError(f"--distribution compares with samples of the reference: {why_not}; or give --against BUNDLE")
    stages = skipped(why_not) if reference is None else stage_rungs(bundle, reference, notify)
    fresh = None
    if reference is not None:
        from mmd_export.ladder import fresh_golden

        notify(f"the float64 reference on noises of seed {seed}")
        fresh = fresh_golden(bundle, reference.checkpoint, reference.plan, seed)
    notify(f"rung 6: the artefact in {runtime.name}")
    options = RunOptions(checkpoint=checkpoint)
    rung = check_artefact(bundle, runtime, options, limits, fresh)
    rungs = (*stages, rung)
    if distribution is not None:
        sampler = None if reference is None else (reference.checkpoint, reference.plan)
        session = runtime.open(bundle, options)
        rungs = (*rungs, distribution_rung(bundle, session, sampler, distribution, notify, limits or NO_LIMITS))
    culprit = _culprit(bundle, rung, reference, fresh, notify) if bisect else None
    advice = device_advice(bundle.manifest, runtime.name, rung)
    unchecked, detail = tuple(_unchecked(bundle, reference, distribution)), runtime.availability().detail
    return ParityReport(bundle.name, runtime.name, rungs, detail, unchecked, culprit, bundle.artefact_sha256, advice)


def find_reference(bundle: Bundle, model: str | None, notify: Callable[[str], None]) -> tuple[Reference | None, str]:
    """The checkpoint ``model``, which must be the bundle's; or None, and why."""
    name = bundle.manifest.checkpoint.name
    if model is None:
        hint = name if name in BUILT_IN else "MODEL"
        return None, f"the checkpoint {name!r} was not given; pass --checkpoint {hint}"
    if missing := uninstalled(("torch", "diffusers")):
        return None, f"{missing} not installed; pip install 'mmd-export[tune]'"
    from mmd_export.checkpoint import load_matching
    from mmd_export.plan import StepPlan

    notify("reading the checkpoint")
    checkpoint = load_matching(model, bundle.manifest.checkpoint)
    return Reference(checkpoint, StepPlan.from_dict(bundle.manifest.plan)), ""


def skipped(reason: str) -> tuple[Rung, ...]:
    """Rungs 1 to 5 as not checked."""
    return tuple(Rung(number, skipped=reason) for number in range(1, 6))


def stage_rungs(bundle: Bundle, reference: Reference, notify: Callable[[str], None]) -> tuple[Rung, ...]:
    """Rungs 1 to 5."""
    from mmd_export.ladder import exact_rung, scheduler_rung, stage_rungs

    checkpoint, plan = reference.checkpoint, reference.plan
    notify("rungs 1 and 2: the plan")
    of_plan = exact_rung(plan, checkpoint.scheduler), scheduler_rung(plan, checkpoint.scheduler)
    notify("rungs 3 to 5: the sampler in torch")
    return (*of_plan, *stage_rungs(bundle, checkpoint, plan))


def _unchecked(bundle: Bundle, reference: Reference | None, distribution: DistributionOptions | None) -> list[str]:
    """What is left out and is no rung that was skipped."""
    lines = []
    if reference is None:
        lines.append(f"noises other than the {bundle.golden().count} of the golden file: they need --checkpoint")
    if distribution is None:
        lines.append("rung 7: pass --distribution for the test on many samples")
    batch = bundle.manifest.batch
    run = {rows.stop - rows.start for _, rows in chunks(bundle)}
    missing = [size for size in range(batch.smallest, batch.largest + 1) if batch.allows(size) and size not in run]
    if missing:
        lines.append(f"batch sizes {', '.join(map(str, missing))}: the golden file holds none of so many images")
    return lines


def _culprit(
    bundle: Bundle, rung: Rung, reference: Reference | None, fresh: Golden | None, notify: Callable[[str], None]
) -> Culprit | None:
    """What ``--bisect`` finds, None where rung 6 holds."""
    if rung.passed:
        notify("rung 6 holds, so there is nothing to bisect")
        return None
    assert reference is not None
    from mmd_export.blame import find_culprit, step_alone

    try:
        return find_culprit(bundle, rung, reference.checkpoint, reference.plan, fresh, notify)
    except NotAvailableError as error:  # the verdict stands all the same
        return step_alone(bundle, rung, str(error))
