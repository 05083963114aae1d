"""The model card of a run folder: what it is, what it came from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmd_export.checkpoint import Checkpoint, describe
from mmd_export.plan import StepPlan, is_learned
from mmd_finetune.metrics.bootstrap import Measured

if TYPE_CHECKING:
    from mmd_finetune.run_folder import RunResult

_TEMPLATE = """\
---
library_name: diffusers
{licence_line}{base_line}tags: [diffusion, few-step, mmd]
---
# {name} tuned for {plan}

A denoiser finetuned with the Maximum Mean Discrepancy (MMD-DDM, arXiv 2301.07969) for one sampler: {plan}, with the
gradient through all {steps} network calls. `plan.json` holds the sampler's numbers. With another step count or sampler
the weights are not what was measured here.

| held-out Frechet distance, {count} samples (95 % interval) | before | after |
|---|---|---|
{distances}
{metrics}
The loss never sees these encoders. The best average weights (iteration {best} of {iterations}) were chosen by the
distance in `{holdout}` on other noise; the numbers above are on noise that was used for nothing else. `before.png` and
`after.png` show the same noise. Tuning took {seconds:.0f} s.

## Lineage
- base model: `{name}`, SHA-256 of its weights and configs `{base_sha256}`
- data: `{data}`, SHA-256 `{data_sha256}`
- plan: SHA-256 `{plan_sha256}`{learned}
- licence: {licence}

## Settings
| setting | value |
|---|---|
{settings}
"""


def model_card(record: Mapping[str, Any], base: Checkpoint, plan: StepPlan, result: RunResult) -> str:
    """Markdown from the run's record (``Task.record``) and its result; no path of the machine."""
    settings = record["settings"]
    name = base.hub_id or settings["model"]
    return _TEMPLATE.format(
        licence_line=f"license: {base.licence.lower()}\n" if base.licence else "",
        base_line=f"base_model: {base.hub_id}\n" if base.hub_id else "",
        licence=base.licence or "that of the base model, which does not state one in its folder",
        name=name,
        plan=describe(plan),
        learned=f", learned from it: SHA-256 `{plan.digest()}`" if is_learned(plan) else "",
        steps=plan.step_count,
        holdout=settings["holdout"][0],
        count=settings["evaluate_count"],
        data=settings["data"],
        distances="\n".join(f"| `{name}` | {before} | {after} |" for name, (before, after) in result.told.items()),
        metrics=_metrics(result.metrics),
        best=result.best_iteration,
        iterations=result.iterations,
        seconds=result.seconds,
        settings="\n".join(f"| {key} | {_shown(value)} |" for key, value in settings.items()),
        **{key: record[key] for key in ("base_sha256", "data_sha256", "plan_sha256")},
    )


def _metrics(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the further metrics with their 95 % intervals, if there are any."""
    lines = []
    for encoder, by_name in found.items():
        for name, sides in by_name.items():
            before, after = (Measured(**sides[side]).told(".4g") for side in ("before", "after"))
            lines.append(f"| {name}, `{encoder}` | {before} | {after} |")
    return "\n".join(
        ["", "| same samples (95 % interval) | before | after |", "|---|---|---|", *lines, ""] if lines else []
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "default" if value is None else str(value)
