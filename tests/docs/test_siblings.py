"""The examples of docs/siblings.md: what each trains is what its plan runs, and its graph passes the ladder."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from docs.examples import latent_consistency, mmd_gradient_flow, one_step_generator, progressive_distillation
from docs.examples.shortcut_finetuning import quadratic_grid
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint, load_matching
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, alphas_cumprod
from mmd_export.solvers import make_plan

INPUTS = {
    "shortcut_finetuning": ["noise", "step_noise"],
    "one_step_generator": ["noise"],
    "progressive_distillation": ["noise"],
    "latent_consistency": ["noise", "step_noise"],
    "mmd_gradient_flow": ["noise"],
}
# Rung 1 has exact answers for DDIM and DDPM only; diffusers' DDIM has no listed timesteps to compare with in rung 2.
OF_PLAN = {
    "shortcut_finetuning": ["passed", "not checked"],
    "one_step_generator": ["not checked", "passed"],
    "progressive_distillation": ["passed", "passed"],
    "latent_consistency": ["not checked", "passed"],
    "mmd_gradient_flow": ["not checked", "passed"],
}
CALLS = {
    "shortcut_finetuning": 10, "one_step_generator": 1, "progressive_distillation": 4, "latent_consistency": 4,
    "mmd_gradient_flow": mmd_gradient_flow.QUICK_CALLS,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_quick_mode_leaves_a_verified_bundle(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = importlib.import_module(f"docs.examples.{name}").run(out, quick=True)
    verdicts = [rung["verdict"] for rung in result["parity"]]
    assert verdicts[:2] == OF_PLAN[name]
    assert verdicts[2:] == ["passed"] * 4
    assert len(result["timesteps"]) == CALLS[name]
    assert result["inputs"] == INPUTS[name]
    assert all(np.isfinite(value) for value in result["held_out_frechet_distance"].values())
    assert np.asarray(Image.open(out / "samples.png")).std() > 20
    bundle = Bundle.open(out / "bundle")
    step_noises = {spec.name: spec.shape[0] for spec in bundle.manifest.inputs}.get("step_noise", 0)
    assert step_noises == result["step_noises"] == {"shortcut_finetuning": 9, "latent_consistency": 3}.get(name, 0)
    if name != "mmd_gradient_flow":
        folder = out / ("run" if (out / "run").exists() else "student")
        weights = load_matching(str(folder), bundle.manifest.checkpoint).denoiser.state_dict()
        assert any(not torch.equal(weights[key], value) for key, value in digits().items())


@functools.cache
def digits() -> dict[str, Any]:
    return load_checkpoint("digits").denoiser.state_dict()


def test_the_quadratic_grid() -> None:
    assert quadratic_grid(4, 900) == (900, 400, 100, 0)
    assert quadratic_grid(10) == (999, 789, 604, 444, 308, 197, 111, 49, 12, 0)


def test_the_generator_is_one_affine_call() -> None:
    config = load_checkpoint("digits").scheduler
    (step,) = make_plan(config, **one_step_generator.PLAN.wanted).steps
    alpha_bar = alphas_cumprod(config)[one_step_generator.TIMESTEP]
    sigma = ((1.0 - alpha_bar) / alpha_bar) ** 0.5
    plan = make_plan(config, **one_step_generator.PLAN.wanted)
    weights = {term.source: term.weight for term in step.update}
    assert sigma == pytest.approx(2.5, abs=0.02)
    assert plan.initial_scale * step.scale == pytest.approx(1.0)  # the network sees unit noise
    assert plan.initial_scale * weights["state"] == pytest.approx((sigma**2 + 1.0) ** 0.5)
    assert weights["output"] == pytest.approx(-sigma)


def test_a_generator_out_of_a_rectified_flow() -> None:
    plan = make_plan(SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler"}), 1)
    assert plan.timesteps == (1000.0,)
    assert [(term.source, term.weight) for term in plan.steps[0].update] == [("state", 1.0), ("output", -1.0)]


def student_plan(scheduler: dict[str, Any], steps: int) -> StepPlan:
    return make_plan(SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **scheduler}), steps)


def test_the_target_of_distillation_is_where_the_plan_of_the_student_goes() -> None:
    task = progressive_distillation.Distillation(progressive_distillation.STEPS)
    plan = student_plan(progressive_distillation.SCHEDULER, progressive_distillation.STEPS)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, step in enumerate(plan.steps):
        assert step.timestep == task.grid[2 * k]
        place = torch.full((3,), k)
        weights = {term.source: term.weight for term in step.update}
        reached = weights["state"] * z + weights["output"] * task.target(z, place)
        assert torch.allclose(reached, task.goal(z, place), atol=1e-4)


def test_the_consistency_function_is_the_last_step_of_the_plan() -> None:
    task = latent_consistency.Distillation()
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = SchedulerConfig.from_dict(latent_consistency.SCHEDULER | digits_betas())
    for timestep in (1, 49, 499, 999):
        (step,) = make_plan(config, None, timesteps=(timestep,)).steps
        weights = {term.source: term.weight for term in step.update}
        expected = weights["state"] * z + weights["output"] * torch.sin(z)
        found = task.consistent(Sine(), z, torch.full((3,), timestep))
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(task.consistent(Sine(), z, torch.full((3,), -1)), z)
    multistep = make_plan(config, latent_consistency.STEPS)
    assert set(multistep.timesteps) <= set(map(float, task.grid))
    assert multistep.noisy_steps == latent_consistency.STEPS - 1


class Sine(torch.nn.Module):
    def forward(self, z: torch.Tensor, _timestep: torch.Tensor) -> torch.Tensor:
        return torch.sin(z)


def digits_betas() -> dict[str, Any]:
    return {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def test_the_flow_goes_down_its_witness_function() -> None:
    flow = mmd_gradient_flow.record_flow(3, 16).double()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for timestep in (3, 1):
        k = torch.tensor([3 - timestep])
        step = 1e-5
        slope = (flow.witness(x + step * direction, k) - flow.witness(x - step * direction, k)) / (2 * step)
        output = flow(x, torch.tensor([timestep]))
        expected = (output * direction).flatten(1).sum(1) / (3 * flow.rates[k])
        assert torch.allclose(slope, expected, rtol=1e-6)
    plan = make_plan(SchedulerConfig.from_dict(flow.scheduler_config), 3)
    assert plan.timesteps == (3.0, 2.0, 1.0)
    for step_of_plan in plan.steps:
        weights = {term.source: term.weight for term in step_of_plan.update}
        assert weights["state"] == pytest.approx(1.0)
        assert weights["output"] == pytest.approx(-1.0 / 3.0)
