"""Read the table of a diffusers scheduler off its class: basis vectors in, coefficients out. torch and diffusers.

At call k the scheduler gets ``e(state_k)`` as its sample and ``e(output_k)`` as the model's output, so its own history
stays linear in known symbols, and the coefficients of the state that it returns are the terms of the step. Noise that
it draws is ``e(noise_s)``; a clamp with constant bounds is taken for the clean guess and becomes ``e(clean_k)``.
Anything else that is not affine is refused by the name of the operation, and a second run on random inputs is held
against the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmd_export.diffusers_loop import DiffusersLoop, chain, loop_of
from mmd_export.errors import UsageError
from mmd_export.plan import PredictionType, Scalar, Source, Step, StepPlan, Term
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import FIXED_PREDICTION
from mmd_export.unroll import UnrolledSampler

VERIFIED = 1e-9  # relative; affine schedulers come out below 1e-12
NEGLIGIBLE = 1e-14  # of the largest weight of a step: what rounding leaves of a term that cancels
NEGLIGIBLE_STD = 1e-10
TINY = 1e-300
CLAMPS = {"clamp", "clip", "clamp_", "clip_"}
NOT_AFFINE = {
    "__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "abs", "absolute", "quantile", "max",
    "min", "amax", "amin", "maximum", "minimum", "norm", "std", "var", "sqrt", "rsqrt", "exp", "expm1", "log", "sign",
    "sigmoid", "tanh", "softmax", "sort", "topk", "median", "argmax", "pow", "__pow__", "square", "where", "clamp_min",
    "clamp_max", "reciprocal", "round", "floor", "relu", "heaviside", "nonzero", "eq", "__eq__", "gt", "__gt__", "lt",
    "__lt__", "ge", "le",
}  # fmt: skip
_SOURCES: tuple[Source, ...] = ("state", "output", "clean", "noise")


class _Recorder:
    """One basis vector a symbol, and what is learnt while call k runs."""

    def __init__(self, name: str, calls: int) -> None:
        self.name, self.calls = name, calls
        self.counts: dict[Source, int] = {"state": calls, "output": calls, "clean": calls, "noise": 4 * calls}
        self.k = 0
        self.noises = 0
        self.guess: tuple[float, float] | None = None
        self.clip: float | None = None
        self.tensor = _symbolic(self)

    def place(self, source: Source, index: int) -> int:
        """The coordinate of a symbol."""
        before = _SOURCES[: _SOURCES.index(source)]
        return sum(self.counts[other] for other in before) + index

    def symbol(self, source: Source, index: int) -> Tensor:
        """Basis vector (1, 1, 1, N)."""
        vector = torch.zeros(1, 1, 1, sum(self.counts.values()), dtype=torch.float64)
        vector[..., self.place(source, index)] = 1.0
        return vector.as_subclass(self.tensor)

    def draw(self, _like: Any = None) -> Tensor:
        """A noise of its own for every draw."""
        self.noises += 1
        if self.noises > self.counts["noise"]:
            raise self.refusal(f"call {self.k} draws noise more than {self.counts['noise']} times in all")
        return self.symbol("noise", self.noises - 1)

    def read(self, vector: Tensor) -> dict[tuple[Source, int], float]:
        """Symbol -> weight of every coefficient that is not rounding."""
        weights = vector.as_subclass(Tensor).flatten().tolist()
        largest = max(map(abs, weights))
        found: dict[tuple[Source, int], float] = {}
        for source in _SOURCES:
            for index in range(self.counts[source]):
                weight = weights[self.place(source, index)]
                if abs(weight) > NEGLIGIBLE * largest:
                    found[source, index] = weight
        return found

    def clamp(self, guess: Tensor, low: Any, high: Any) -> Tensor:
        """The clean guess of this call; refused unless it is one: constant bounds, of this call only, once."""
        if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or high is None:
            raise self.refusal(f"call {self.k} clamps to bounds that depend on the data (dynamic thresholding)")
        if float(low) != -float(high) or self.clip not in (None, float(high)):
            raise self.refusal(f"call {self.k} clamps to {low} ... {high}, an earlier one to {self.clip}")
        weights = self.read(guess)
        if self.guess is not None or not set(weights) <= {("state", self.k), ("output", self.k)}:
            raise self.refusal(f"call {self.k} clamps twice, or something that is no clean guess")
        self.clip = float(high)
        self.guess = weights.get(("state", self.k), 0.0), weights.get(("output", self.k), 0.0)
        return self.symbol("clean", self.k)

    def refusal(self, why: str) -> UsageError:
        """The error that names the scheduler and what is not affine."""
        return UsageError(f"scheduler {self.name} is not affine: {why}; choose another scheduler or switch that off")


def _symbolic(recorder: _Recorder) -> type[Tensor]:
    """A Tensor class whose operations are watched by ``recorder``."""

    class Symbolic(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            options, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
            if name in CLAMPS:
                low, high = (*args[1:], None, None)[:2]
                return recorder.clamp(args[0], options.get("min", low), options.get("max", high))
            symbolic = [isinstance(arg, Symbolic) for arg in args]
            product = sum(symbolic) > 1 and name in ("mul", "__mul__", "mul_", "matmul", "__rmul__")
            quotient = len(args) > 1 and symbolic[1] and name in ("div", "__truediv__", "true_divide", "div_")
            if name in NOT_AFFINE or product or quotient:
                raise recorder.refusal(f"call {recorder.k} takes {name} of the state or the output")
            return super().__torch_function__(func, types, args, options)  # type: ignore[no-untyped-call]

    return Symbolic


def probe(config: SchedulerConfig, steps: int, eta: float | None = None) -> StepPlan:
    """The plan of ``steps`` inference steps of the config's own class; raises UsageError if it has none.

    In float64 (see ``mmd_export.diffusers_loop``), so that the numbers are those of a table written by hand.
    """
    watched = _Recorder(config.class_name, 1)
    loop = loop_of(config, steps, lambda _: watched.draw(), eta)
    watched = _Recorder(config.class_name, loop.calls + 1)  # one coordinate of each kind stays unmet
    rows: list[tuple[Step, dict[tuple[Source, int], float]]] = []
    for k, timestep in enumerate(loop.timesteps[: loop.calls]):
        watched.k, watched.guess = k, None
        state, output = watched.symbol("state", k), watched.symbol("output", k)
        scale = _scale(watched, loop.scaled(k, state), k)
        weights = watched.read(loop.step(k, output, state))
        _require_known(watched, weights)
        alpha, sigma = _level(loop, timestep, scale)
        rows.append((Step(timestep, alpha, sigma, (), watched.guess, scale), weights))
    prediction: PredictionType = FIXED_PREDICTION.get(config.sampler, config.prediction_type)
    if config.get("of_flow"):
        prediction = "flow_prediction"
    plan = StepPlan(
        solver=config.sampler,
        prediction_type=prediction,
        steps=_numbered(rows),
        clip=watched.clip,
        initial_scale=loop.initial_scale,
        settings=_settings(config, steps, loop.calls, eta),
    )
    _verify(plan, config, steps, eta)
    return plan


def _require_known(watched: _Recorder, weights: Mapping[tuple[Source, int], float]) -> None:
    """A constant adds to every coordinate, so to those of symbols that no call has met yet."""
    unmet = [(source, index) for source, index in weights if source != "noise" and index > watched.k]
    if unmet or any(source == "noise" and index >= watched.noises for source, index in weights):
        raise watched.refusal(f"call {watched.k} adds a constant to the state")


def _scale(watched: _Recorder, scaled: Tensor, k: int) -> float:
    weights = watched.read(scaled)
    if set(weights) != {("state", k)}:
        raise watched.refusal(f"scale_model_input of call {k} mixes {sorted(weights)}")
    return weights["state", k]


def _level(loop: DiffusersLoop, timestep: float, scale: float) -> tuple[float, float]:
    """The level of the network's input, where the class says it; (1, 0) where it does not."""
    if loop.config.get("of_flow"):
        return 1.0 - timestep, timestep
    if scale != 1.0:
        return scale, math.sqrt(max(1.0 - scale**2, 0.0))
    table = getattr(loop.scheduler, "alphas_cumprod", None)
    if table is None or not 0 <= round(timestep) < len(table):
        return 1.0, 0.0
    alpha_bar = float(table[round(timestep)])
    return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


def _numbered(rows: list[tuple[Step, dict[tuple[Source, int], float]]]) -> tuple[Step, ...]:
    """Steps with terms in the plan's order; noises that never count are left out and the others numbered anew."""
    drawn = {symbol[1]: 0.0 for _, weights in rows for symbol in weights if symbol[0] == "noise"}
    for _, weights in rows:
        for (source, index), weight in weights.items():
            if source == "noise":
                drawn[index] = max(drawn[index], abs(weight))
    kept = sorted(index for index, weight in drawn.items() if weight > NEGLIGIBLE_STD)
    number = {index: i for i, index in enumerate(kept)}
    steps = []
    for k, (step, weights) in enumerate(rows):
        known = sorted((s for s in weights if s[0] != "noise"), key=lambda s: (k - s[1], _SOURCES.index(s[0])))
        noises = sorted(s for s in weights if s[0] == "noise" and s[1] in number)
        terms = [Term(source, index, weights[source, index]) for source, index in known]
        terms += [Term("noise", number[index], weights["noise", index]) for _, index in noises]
        update = tuple(terms) or (Term("state", k, 0.0),)
        clean = step.clean if any(("clean", k) in later for _, later in rows[k:]) else None
        steps.append(Step(step.timestep, step.alpha, step.sigma, update, clean, step.scale))
    return tuple(steps)


def _settings(config: SchedulerConfig, steps: int, calls: int, eta: float | None) -> dict[str, Scalar]:
    settings: dict[str, Scalar] = {"timestep_spacing": config.timestep_spacing, "source": "probed"}
    if eta is not None:
        settings["eta"] = eta
    return settings | ({"num_inference_steps": steps, "calls": calls} if steps != calls else {})


def fresh_noises(plan: StepPlan) -> list[list[int]]:
    """The noises that each step is the first to use."""
    seen: set[int] = set()
    fresh = []
    for step in plan.steps:
        new = [term.index for term in step.update if term.source == "noise" and term.index not in seen]
        fresh.append(sorted(set(new)))
        seen |= set(new)
    return fresh


def both_chains(
    plan: StepPlan, config: SchedulerConfig, steps: int, eta: float | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every state of the plan and of diffusers' own loop over ``bent``, on the same random noises, in float64."""
    generator = torch.Generator().manual_seed(20230107)
    shape = (2, 1, 3, 3)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    step_noise = torch.randn(plan.noisy_steps, *shape, dtype=torch.float64, generator=generator)
    loop = loop_of(config, steps, lambda _: torch.zeros_like(noise), eta)
    if loop.calls != plan.step_count:
        raise UsageError(f"diffusers' {config.class_name} makes {loop.calls} calls, the plan {plan.step_count}")
    ours = UnrolledSampler(_Bent(plan), plan).chain(noise, step_noise if plan.noisy_steps else None)
    drawn = [[step_noise[s] for s in row] for row in fresh_noises(plan)]
    told = loop.timesteps  # not the plan's: a wrong timestep in it must show
    return zip(ours, chain(loop, lambda x, k: bent(x, told[k]), noise, drawn), strict=True)


def largest_error(plan: StepPlan, config: SchedulerConfig, steps: int, eta: float | None = None) -> float:
    """The largest error of a state of the plan against diffusers' own loop, relative to that state, in float64."""
    pairs = both_chains(plan, config, steps, eta)
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=TINY)) for a, b in pairs]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _verify(plan: StepPlan, config: SchedulerConfig, steps: int, eta: float | None) -> None:
    if (error := largest_error(plan, config, steps, eta)) > VERIFIED:
        raise UsageError(
            f"scheduler {config.class_name} is not affine: on random inputs its states differ from the probed table by "
            f"{error:.2g}, at most {VERIFIED:g} is rounding; choose another scheduler"
        )


def bent(x: Tensor, timestep: float) -> Tensor:
    """A cheap nonlinear stand-in for a network, different at every timestep."""
    return torch.tanh(0.7 * x + 0.3 * math.sin(timestep)) + 0.1 * x


class _Bent(torch.nn.Module):
    """``bent`` at the timesteps of a plan."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self.timesteps = plan.timesteps

    def forward(self, x: Tensor, k: int, **_: Tensor) -> Tensor:
        return bent(x, self.timesteps[k])
