"""``mmd-export verify``: the parity ladder of a bundle, as far as this machine and what is at hand allow."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from mmd_export.bundle import Bundle
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.parity import ParityReport, Rung, check_artefact
from mmd_export.runtime import RunOptions, Runtime
from mmd_runtime.registry import get_runtime, runtime_for

BUILT_IN = ("digits",)  # known without importing torch; the same names as mmd_export.checkpoint.BUILT_IN


def usable_runtime(bundle: Bundle, name: str | None) -> Runtime:
    """The runtime of that name, or the first that fits the bundle's format; it must work here and fit."""
    artefact_format = bundle.manifest.format
    runtime = get_runtime(name) if name else runtime_for(artefact_format)
    if runtime.formats and artefact_format not in runtime.formats:
        formats = ", ".join(runtime.formats)
        raise UsageError(f"bundle {bundle.name} holds {artefact_format}, runtime {runtime.name} opens {formats}")
    if not (found := runtime.availability()).available:
        raise NotAvailableError(f"runtime {runtime.name} does not work here: {found.detail}; {found.install}")
    return runtime


def verify(
    bundle: Bundle,
    runtime_name: str | None = None,
    checkpoint: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Rungs 1 to 6. Rungs 1 to 5 need the checkpoint and torch; where they are missing the report says so."""
    runtime = usable_runtime(bundle, runtime_name)
    stages = stage_rungs(bundle, checkpoint, notify)
    notify(f"rung 6: the artefact in {runtime.name}")
    options = RunOptions(checkpoint=checkpoint)
    rungs = (*stages, check_artefact(bundle, runtime, options))
    return ParityReport(bundle.name, runtime.name, rungs, runtime.availability().detail)


def stage_rungs(bundle: Bundle, model: str | None, notify: Callable[[str], None]) -> tuple[Rung, ...]:
    """Rungs 1 to 5, or the reason why they were not checked."""
    name = bundle.manifest.checkpoint.name
    if model is None and name not in BUILT_IN:
        return skipped(f"the checkpoint {name!r} is not at hand; pass --checkpoint MODEL")
    if missing := [package for package in ("torch", "diffusers") if find_spec(package) is None]:
        return skipped(f"{', '.join(missing)} not installed; pip install 'mmd-export[tune]'")
    return _checked(bundle, model or name, notify)


def skipped(reason: str) -> tuple[Rung, ...]:
    """Rungs 1 to 5 as not checked."""
    return tuple(Rung(number, skipped=reason) for number in range(1, 6))


def _checked(bundle: Bundle, model: str, notify: Callable[[str], None]) -> tuple[Rung, ...]:
    from mmd_export.checkpoint import load_matching
    from mmd_export.ladder import exact_rung, scheduler_rung, stage_rungs
    from mmd_export.plan import StepPlan

    notify("reading the checkpoint")
    checkpoint = load_matching(model, bundle.manifest.checkpoint)
    plan = StepPlan.from_dict(bundle.manifest.plan)
    notify("rungs 1 and 2: the plan")
    of_plan = exact_rung(plan, checkpoint.scheduler), scheduler_rung(plan, checkpoint.scheduler)
    notify("rungs 3 to 5: the sampler in torch")
    return (*of_plan, *stage_rungs(bundle, checkpoint, plan))
