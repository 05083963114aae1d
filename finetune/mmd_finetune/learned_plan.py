"""A step plan whose numbers are learned: step coefficients and timesteps, with the solver's table as the start.

With parameters theta, all 0 at the start, so that the table is exactly the solver's there:

    w     = w0 (1 + theta)                    of a state, an output, a clean guess, and inside a clean guess
    w     = w0 exp(theta)                     of a step noise: it keeps its sign, so it is never negative
    t_K-1 = max(0, t0_K-1 + g theta)          g: the solver's last gap
    t_k   = t_k+1 + (t0_k - t0_k+1) exp(theta_k)    each gap keeps its sign: the order of the timesteps is the solver's

and all timesteps are shrunk together where the first would pass the last one that the network was trained on. Input
scales and the initial scale stay. Learning a solver's table by gradient: Watson et al. 2022 (arXiv 2202.05830).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from mmd_export.plan import LEARNED, Step, StepPlan, Term, is_learned
from mmd_export.unroll import UnrolledSampler

FIRST_UNIT = 0.1  # what theta = 1 moves the only timestep of a one-step plan by, as a part of the training range


@dataclass(frozen=True)
class LivePlan:
    """What ``UnrolledSampler`` reads of a StepPlan; the learned numbers in ``steps`` are tensors with a gradient.

    ``timesteps``: (K,) float64.
    """

    steps: tuple[Step, ...]
    timesteps: Tensor
    clip: float | None
    initial_scale: float
    clamp_output: bool
    noisy_steps: int

    @property
    def step_count(self) -> int:
        """K, the number of network calls."""
        return len(self.steps)


class PlanNumbers(nn.Module):
    """The parameters theta of a plan, float64.

    Args:
        start: the solver's plan.
        last_timestep: the largest that the network was trained on.
        with_timesteps: learn them too. They stay where the plan holds any below 0: a network told of noise levels in
            another way (EDM).
    """

    def __init__(self, start: StepPlan, last_timestep: float, *, with_timesteps: bool = True) -> None:
        super().__init__()
        self.start = start
        count = sum(1 for _ in _coefficients(start))
        self.coefficients = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self.times: nn.Parameter | None = None
        if with_timesteps and min(start.timesteps) >= 0.0:
            self.times = nn.Parameter(torch.zeros(start.step_count, dtype=torch.float64))
        self.largest = max(last_timestep, *start.timesteps)

    def timesteps(self) -> Tensor:
        """(K,) float64."""
        begin = torch.tensor(self.start.timesteps, dtype=torch.float64, device=self.coefficients.device)
        if self.times is None:
            return begin
        gaps = begin[:-1] - begin[1:]
        unit = float(gaps[-1]) if len(gaps) else FIRST_UNIT * self.largest
        last = (begin[-1] + unit * self.times[-1]).clamp_min(0.0) - begin[-1]
        # Written as shifts, which are exactly 0 at the start.
        shifts = torch.cat([gaps * torch.expm1(self.times[:-1]), last[None]])
        found = begin + shifts.flip(0).cumsum(0).flip(0)
        if float(found.detach().max()) <= 0.0:
            return found
        return (found * (self.largest / found.max()).clamp_max(1.0)).clamp_max(self.largest)  # again, for rounding

    def live(self) -> LivePlan:
        """The plan as tensors, to back-propagate through; computed anew for each pass."""
        start, device = self.start, self.coefficients.device
        begin = torch.tensor([number for number, _ in _coefficients(start)], dtype=torch.float64, device=device)
        noise = torch.tensor([positive for _, positive in _coefficients(start)], device=device)
        learned = begin * torch.where(noise, torch.exp(self.coefficients), 1.0 + self.coefficients)
        # A 0-dim tensor stands where the table has a float: the sampler multiplies with either.
        numbers = iter(cast("Sequence[float]", learned.unbind()))
        times = self.timesteps()
        steps = tuple(_with_numbers(step, numbers) for step in start.steps)
        return LivePlan(steps, times, start.clip, start.initial_scale, start.clamp_output, start.noisy_steps)

    @torch.no_grad()
    def plan(self) -> StepPlan:
        """The table as it is now: the start itself if no number differs from the solver's."""
        live, start = self.live(), self.start
        steps = tuple(
            replace(
                step,
                timestep=float(timestep),
                clean=None if step.clean is None else (float(step.clean[0]), float(step.clean[1])),
                update=tuple(Term(term.source, term.index, float(term.weight)) for term in step.update),
            )
            for step, timestep in zip(live.steps, live.timesteps, strict=True)
        )
        if steps == start.steps:
            return start
        origin = start.settings.get("learned_from", start.solver)
        settings = {**start.settings, "learned_from": origin, "start_sha256": start.digest()}
        solver = start.solver if is_learned(start) else LEARNED + start.solver
        return replace(start, solver=solver, steps=steps, settings=settings)


def _coefficients(plan: StepPlan) -> Iterator[tuple[float, bool]]:
    """Every number that is learned, in the order of ``_with_numbers``, and whether it is the weight of a noise."""
    for step in plan.steps:
        yield from ((number, False) for number in step.clean or ())
        yield from ((term.weight, term.source == "noise") for term in step.update)


def _with_numbers(step: Step, numbers: Iterator[float]) -> Step:
    """``step`` with the next ones of ``numbers`` in the place of its own; alpha and sigma stay those of the start."""
    clean = None if step.clean is None else (next(numbers), next(numbers))
    update = tuple(Term(term.source, term.index, next(numbers)) for term in step.update)
    return replace(step, clean=clean, update=update)


class LearnedSampler(UnrolledSampler):
    """``UnrolledSampler`` over numbers that are learned: every pass runs one over the table as it is then.

    Args:
        network: called as ``network(x, k, timestep)``, timestep (1,).
        numbers: the plan's parameters.
        checkpoint_calls: recompute every network call in the backward pass.
    """

    def __init__(self, network: nn.Module, numbers: PlanNumbers, *, checkpoint_calls: bool = False) -> None:
        super().__init__(network, numbers.start, checkpoint_calls=checkpoint_calls)
        self.numbers = numbers

    def chain(self, noise: Tensor, step_noise: Tensor | None = None, **conditions: Tensor) -> Iterator[Tensor]:
        """``state.1`` ... ``state.K``, each (B, C, H, W), unclamped."""
        live = self.numbers.live()
        calls = _AtLiveTimesteps(self.denoiser, live.timesteps)
        sampler = UnrolledSampler(calls, cast("StepPlan", live), checkpoint_calls=self.checkpoint_calls)
        yield from sampler.chain(noise, step_noise, **conditions)


class _AtLiveTimesteps(nn.Module):
    """Call ``k`` of a network at a timestep that carries a gradient: float32, or float64 where the state is."""

    def __init__(self, network: nn.Module, timesteps: Tensor) -> None:
        super().__init__()
        self.network = network
        self.timesteps = timesteps

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        output: Tensor = self.network(x, k, self.timesteps[k : k + 1].to(dtype), **conditions)
        return output
