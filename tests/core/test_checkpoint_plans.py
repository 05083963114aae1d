"""The plan of a checkpoint: what the options ask for, or what a run folder was tuned for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError


def test_a_sampler_that_expects_another_prediction(tiny: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    for sampler in ("flow-euler", "edm-euler", "consistency"):
        with pytest.raises(UsageError, match=f"tiny: the model predicts v_prediction, --sampler {sampler} expects "):
            checkpoint.plan_for(3, sampler=sampler)
    assert checkpoint.plan_for(3, sampler="euler").prediction_type == "v_prediction"


def test_a_plan_needs_a_step_count(tiny: Path) -> None:
    with pytest.raises(UsageError, match="tiny: --steps is missing"):
        load_checkpoint(tiny).plan_for()


def test_a_run_folder_keeps_its_plan(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    plan = load_checkpoint(folder).plan_for(4, eta=0.5, spacing="trailing")
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    tuned = load_checkpoint(folder)
    assert tuned.plan == plan
    assert tuned.plan_for() == tuned.plan_for(4, eta=0.5) == tuned.plan_for(4, sampler="ddim") == plan
    others: tuple[dict[str, Any], ...] = ({"steps": 5}, {"eta": 0.0}, {"spacing": "leading"})
    for options in others:
        with pytest.raises(UsageError, match=r"tuned for ddim with 4 steps \(trailing, eta 0.5\), asked for ddim with"):
            tuned.plan_for(**options)
    with pytest.raises(UsageError):
        tuned.plan_for(sampler="ddpm")
    for change, same in ((1e-13, True), (1e-6, False)):  # another machine's rounding; a number that was changed
        weights = [[replace(t, weight=t.weight * (1.0 + change)) for t in step.update] for step in plan.steps]
        steps = tuple(replace(step, update=tuple(w)) for step, w in zip(plan.steps, weights, strict=True))
        changed = replace(tuned, plan=replace(plan, steps=steps))
        assert changed.plan_for() == changed.plan != plan
        if same:
            assert changed.plan_for(4) == changed.plan
        else:
            with pytest.raises(UsageError, match="tuned for ddim with 4 steps"):
                changed.plan_for(4)
    silent = replace(tuned, plan=replace(plan, settings={}))
    assert silent.plan_for() == silent.plan
    with pytest.raises(UsageError, match="plan ddim: it does not say how it was made; leave the sampler options out"):
        silent.plan_for(4)
    assert replace(tuned, plan=None).plan_for(5).step_count == 5
