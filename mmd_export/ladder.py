"""Rungs 1 to 5 of the parity ladder: they need the checkpoint, torch and diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmd_export.bundle import Bundle, Golden
from mmd_export.checkpoint import Checkpoint
from mmd_export.errors import UsageError
from mmd_export.parity import Comparison, Rung, compare
from mmd_export.plan import StepPlan, is_learned
from mmd_export.probe import both_chains
from mmd_export.program import SamplerProgram, export_program
from mmd_export.reference import golden_arrays, run_chain, run_in_parts, sampler_of
from mmd_export.schedule import SchedulerConfig, alphas_cumprod
from mmd_export.solvers import resolve
from mmd_export.tolerance import EXACT, torch_tolerance
from mmd_export.unroll import UnrolledSampler

GAUSSIAN_STD = 0.5
PROBE = 1e-3  # small enough that no clean guess is ever clamped, so that the chain is linear


class GaussianDenoiser(nn.Module):
    """The ideal denoiser of data N(0, s^2): E[x0 | x] = alpha s^2 x / (alpha^2 s^2 + sigma^2)."""

    def __init__(self, plan: StepPlan, std: float = GAUSSIAN_STD) -> None:
        super().__init__()
        self.plan, self.std = plan, std

    def forward(self, x: Tensor, k: int, **_: Tensor) -> Tensor:
        """Epsilon, v, x0, eps - x0 or EDM's F = -v, as the plan's prediction type asks; call k."""
        alpha, sigma = self.plan.steps[k].alpha, self.plan.steps[k].sigma
        clean = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * x
        if self.plan.prediction_type == "sample":
            return clean
        eps = sigma / (alpha**2 * self.std**2 + sigma**2) * x
        v = alpha * eps - sigma * clean
        kinds = {"epsilon": eps, "v_prediction": v, "flow_prediction": eps - clean, "edm": -v}
        if self.plan.prediction_type not in kinds:
            raise UsageError(f"the Gaussian denoiser knows no {self.plan.prediction_type} prediction")
        return kinds[self.plan.prediction_type]


def levels_of(plan: StepPlan, config: SchedulerConfig) -> list[tuple[float, float]]:
    """(alpha_bar before, alpha_bar after) of every step, from the schedule alone."""
    alpha_bar, total = alphas_cumprod(config), config.num_train_timesteps
    grid = [int(t) for t in plan.timesteps]
    listed = str(plan.settings["timestep_spacing"]) not in ("leading", "trailing", "linspace")
    if plan.solver == "ddim":
        final = 1.0 if config.set_alpha_to_one or plan.settings["timestep_spacing"] == "mmd-ddm" else alpha_bar[0]
        after = (
            [*(alpha_bar[t] for t in grid[1:]), final]
            if listed
            else [alpha_bar[t - total // len(grid)] if t >= total // len(grid) else final for t in grid]
        )
    else:
        after = [alpha_bar[t] for t in grid[1:]] + [1.0]
    return list(zip((alpha_bar[t] for t in grid), after, strict=True))


def gaussian_gains(plan: StepPlan, config: SchedulerConfig) -> list[float]:
    """What noise and every step noise contribute to the sample for Gaussian data; DDIM eq. 12 with DDPM as eta 1.

    x' = sqrt(a') E[x0|x] + sqrt(1 - a' - std^2) E[eps|x] + std z, with std = eta sqrt((1-a')/(1-a) (1 - a/a')).
    """
    eta = float(plan.settings.get("eta", 0.0) or 0.0) if plan.solver == "ddim" else 1.0
    grid, gains = plan.timesteps, [1.0]
    for (a, b), timestep in zip(levels_of(plan, config), grid, strict=True):
        posterior = eta * math.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0))
        marginal = a * GAUSSIAN_STD**2 + 1 - a
        direction = math.sqrt(max(1 - b - posterior**2, 0.0) * (1 - a))
        shrink = (math.sqrt(a * b) * GAUSSIAN_STD**2 + direction) / marginal
        drawn = math.sqrt(1 - a / b) if plan.settings.get("variance_type") == "fixed_large" else posterior
        gains = [gain * shrink for gain in gains]
        if drawn > 1e-10 and not (plan.solver == "ddpm" and timestep == 0):
            gains.append(drawn)
    return gains


def exact_rung(plan: StepPlan, config: SchedulerConfig) -> Rung:
    """Rung 1: the linear response of the sampler on Gaussian data against its closed form, for DDIM and DDPM."""
    if is_learned(plan):
        return Rung(1, skipped="the plan was learned: no closed form describes it")
    if plan.solver not in ("ddim", "ddpm"):
        return Rung(1, skipped=f"no closed form is written down for {plan.solver}; rung 2 compares its every state")
    inputs = 1 + plan.noisy_steps
    basis = PROBE * torch.eye(inputs, dtype=torch.float64)
    step_noise = basis[:, 1:].T.reshape(plan.noisy_steps, inputs, 1, 1, 1) if plan.noisy_steps else None
    sampler = UnrolledSampler(GaussianDenoiser(plan), replace(plan, clamp_output=False))
    response = sampler(basis[:, 0].reshape(inputs, 1, 1, 1), step_noise).flatten() / PROBE
    expected = np.array(gaussian_gains(plan, config)) * plan.initial_scale
    return Rung(1, (compare("gains", response.numpy()[None], expected[None], image=False),), EXACT.atol)


def scheduler_rung(plan: StepPlan, config: SchedulerConfig) -> Rung:
    """Rung 2: the same calls through diffusers' own scheduler and loop, in float64; relative where states are large."""
    if is_learned(plan):
        return Rung(2, skipped="the plan was learned: no scheduler of diffusers has its numbers")
    steps = int(str(plan.settings.get("num_inference_steps", plan.step_count)))
    eta = plan.settings.get("eta")
    try:
        chosen, _ = resolve(config, steps, sampler=plan.solver, spacing=str(plan.settings["timestep_spacing"]))
        pairs = list(both_chains(plan, chosen, steps, None if eta is None else float(eta)))
    except UsageError as error:
        return Rung(2, skipped=str(error))
    found = []
    for k, (ours, theirs) in enumerate(pairs, start=1):
        scale = max(1.0, float(theirs.abs().max()))
        found.append(compare(f"state.{k}", (ours / scale).numpy(), (theirs / scale).numpy(), image=False))
    return Rung(2, tuple(found), EXACT.atol)


def stage_rungs(bundle: Bundle, checkpoint: Checkpoint, plan: StepPlan) -> list[Rung]:
    """Rungs 3 to 5 on the golden noises: float64, float32, specialised, exported, each against the one before."""
    golden = bundle.golden()
    batch = bundle.manifest.batch.smallest if bundle.manifest.batch.is_static else None
    program = export_program(
        checkpoint.denoiser, plan, checkpoint.shape, batch, checkpoint.conditions, checkpoint.decoder
    )
    inputs = dict(golden.inputs)
    exact = {f"state.{k}": state for k, state in enumerate(golden.states, start=1)}
    again = run_chain(sampler_of(checkpoint.as_double(), plan), inputs, torch.float64)
    plain = run_chain(sampler_of(checkpoint, plan), inputs)
    captured = None if program.decoder is None else program.decoder.runner()
    special = _in_batches(UnrolledSampler(program.denoiser, plan, decoder=checkpoint.decoder), program, inputs)
    exported = _in_batches(UnrolledSampler(program.runner(), plan, decoder=captured), program, inputs)
    atol = torch_tolerance(plan.output_gain).atol
    if program.decoder is not None:
        exact["sample"] = again["sample"]
    third = _states("golden ", again, exact) + _states("", plain, exact)
    return [
        Rung(3, tuple(third), atol),
        Rung(4, tuple(_states("", special, plain, exact)), atol),
        Rung(5, tuple(_states("", exported, special, exact)), atol),
    ]


def _states(
    prefix: str,
    actual: dict[str, NDArray[Any]],
    expected: dict[str, NDArray[Any]],
    names: Iterable[str] | None = None,
) -> list[Comparison]:
    """Every state, and the decoded image if there is one."""
    return [compare(prefix + name, actual[name], expected[name]) for name in names or expected]


def _in_batches(
    sampler: UnrolledSampler, program: SamplerProgram, inputs: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """A captured graph takes one batch size; golden noises come in multiples of it."""
    return run_in_parts(sampler, inputs, program.batch or len(inputs["noise"]))


def fresh_golden(bundle: Bundle, checkpoint: Checkpoint, plan: StepPlan, seed: int) -> Golden:
    """What the golden file would hold had its noises another seed: as many images, from the float64 reference.

    What the network is told besides is the golden file's: ranges were set for that, where the user gave it.
    """
    golden = bundle.golden()
    output = "uint8" if golden.sample.dtype == np.uint8 else "float32"
    told = tuple(replace(each, values=golden.inputs[each.name]) for each in checkpoint.conditions)
    arrays = golden_arrays(replace(checkpoint, conditions=told), plan, golden.count, output, seed)
    states = tuple(arrays[f"state.{k}"] for k in range(1, plan.step_count + 1))
    return Golden({name: arrays[name] for name in golden.inputs}, arrays["sample"], states)
