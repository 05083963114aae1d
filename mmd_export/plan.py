"""A few-step sampler as a table of numbers. Standard library only.

A plan makes K network calls. With ``state.0 = initial_scale * noise``, call k = 0 ... K-1 is

    output_k = network(scale_k * state_k, timestep_k)
    clean_k  = clamp(a_k * state_k + b_k * output_k, -clip, clip)         (only where the step needs it)
    state_{k+1} = sum of weight * {state_j, output_j, clean_j, noise_s},  j <= k

and the sample is ``state_K``, clamped to [-1, 1] for pixel models. Every number is a float64 computed once on the host,
so a sampler can become neither a branch nor an op of the graph.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from mmd_export.errors import UsageError

Source: TypeAlias = Literal["state", "output", "clean", "noise"]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "edm", "trigflow"]
Scalar: TypeAlias = "str | int | float | bool | None"
LEARNED = "learned-"  # in front of the solver that a learned plan started from


@dataclass(frozen=True)
class Term:
    """``weight * source[index]``: ``index`` counts network calls from 0, or noisy steps for ``noise``."""

    source: Source
    index: int
    weight: float


@dataclass(frozen=True)
class Step:
    """One network call and the affine update behind it. ``alpha``, ``sigma``: the level of its input."""

    timestep: float
    alpha: float
    sigma: float
    update: tuple[Term, ...]
    clean: tuple[float, float] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class StepPlan:
    """The whole sampler. ``settings`` says how the table was made; it has no effect on the result."""

    solver: str
    prediction_type: PredictionType
    steps: tuple[Step, ...]
    clip: float | None = None
    initial_scale: float = 1.0
    clamp_output: bool = True
    settings: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("plan: it has no step; ask for at least 1")
        if self.prediction_type not in get_args(PredictionType):
            known = ", ".join(get_args(PredictionType))
            raise UsageError(f"plan: prediction type {self.prediction_type!r} is unknown; known: {known}")
        if not all(math.isfinite(number) for number in self._numbers()):
            raise UsageError(f"plan {self.solver}: a coefficient is not finite; choose another schedule or step count")
        for k, step in enumerate(self.steps):
            self._check_step(k, step)
        drawn = [term.index for step in self.steps for term in step.update if term.source == "noise"]
        if sorted(set(drawn)) != list(range(len(set(drawn)))):
            raise UsageError(
                f"plan {self.solver}: noise inputs {sorted(set(drawn))} are not numbered from 0 without gaps"
            )

    def _numbers(self) -> Iterator[float]:
        yield from (self.initial_scale, 0.0 if self.clip is None else self.clip)
        for step in self.steps:
            yield from (step.timestep, step.alpha, step.sigma, step.scale, *(step.clean or ()))
            yield from (term.weight for term in step.update)

    def _check_step(self, k: int, step: Step) -> None:
        if not step.update:
            raise UsageError(f"plan {self.solver}: step {k} has no update")
        if step.clean is not None and self.clip is None:
            raise UsageError(f"plan {self.solver}: step {k} clamps the clean guess, but the plan has no clip range")
        for term in step.update:
            if term.source not in get_args(Source):
                raise UsageError(f"plan {self.solver}: step {k} uses the unknown source {term.source!r}")
            if term.source != "noise" and not 0 <= term.index <= k:
                raise UsageError(
                    f"plan {self.solver}: step {k} uses {term.source} {term.index}, which is not known yet"
                )
            if term.source == "clean" and self.steps[term.index].clean is None:
                raise UsageError(f"plan {self.solver}: step {k} uses clean {term.index}, which no step computes")

    @property
    def step_count(self) -> int:
        """K, the number of network calls."""
        return len(self.steps)

    @property
    def noisy_steps(self) -> int:
        """S, the number of step noises that the graph takes."""
        return len({term.index for step in self.steps for term in step.update if term.source == "noise"})

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told, call by call."""
        return tuple(step.timestep for step in self.steps)

    @property
    def output_gain(self) -> float:
        """The largest factor by which a step multiplies outputs of the network, and their rounding with them."""
        gains = []
        for step in self.steps:
            factors: dict[int, float] = {}
            for term in step.update:
                clean = self.steps[term.index].clean if term.source == "clean" else None
                if term.source == "output" or clean is not None:
                    factor = term.weight if clean is None else term.weight * clean[1]
                    factors[term.index] = factors.get(term.index, 0.0) + factor
            gains.append(sum(map(abs, factors.values())))
        return max(gains)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` gives the equal plan back, bit for bit."""
        plan = {name: getattr(self, name) for name in ("solver", "prediction_type", "clip", "initial_scale")}
        plan |= {"clamp_output": self.clamp_output, "settings": dict(self.settings)}
        return plan | {"steps": [_step_to_dict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepPlan:
        """The plan in ``data``; raises UsageError that names an unknown or missing key."""
        _check_keys("plan", data, cls)
        try:
            return cls(**{**data, "steps": tuple(_step_from_dict(step) for step in data["steps"])})
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UsageError(f"plan: a value has the wrong type or length ({error})") from error

    def agrees(self, other: StepPlan, tolerance: float) -> bool:
        """Whether both compute one sampler, every number within ``tolerance``, relative above 1.

        A term that is not there has weight 0. The levels of a step are not compared: they say where it is, and nothing
        is computed with them.
        """
        if self.step_count != other.step_count:
            return False
        ours, theirs = self._computed(), other._computed()
        return all(
            math.isclose(ours.get(key, 0.0), theirs.get(key, 0.0), rel_tol=tolerance, abs_tol=tolerance)
            for key in ours | theirs
        )

    def _computed(self) -> dict[tuple[Any, ...], float]:
        """Every number that a sample depends on, by its place."""
        found: dict[tuple[Any, ...], float] = {
            ("initial_scale",): self.initial_scale,
            ("clip", self.clip is None): self.clip or 0.0,
            ("clamp_output",): float(self.clamp_output),
            ("predicts", self.prediction_type): 1.0,
        }
        for k, step in enumerate(self.steps):
            found |= {(k, "timestep"): step.timestep, (k, "scale"): step.scale}
            if step.clean is not None:
                found |= {(k, "clean", 0): step.clean[0], (k, "clean", 1): step.clean[1]}
            for term in step.update:
                key = (k, term.source, term.index)
                found[key] = found.get(key, 0.0) + term.weight
        return found

    def digest(self) -> str:
        """SHA-256 over the numbers; two plans with the same digest compute the same sampler."""
        numbers = {key: value for key, value in self.to_dict().items() if key != "settings"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def is_learned(plan: StepPlan) -> bool:
    """Whether the numbers were learned from those of a solver; ``settings`` then say from which."""
    return plan.solver.startswith(LEARNED)


def _step_to_dict(step: Step) -> dict[str, Any]:
    row = {name: getattr(step, name) for name in ("timestep", "alpha", "sigma", "scale")}
    row["clean"] = None if step.clean is None else list(step.clean)
    return row | {"update": [[term.source, term.index, term.weight] for term in step.update]}


def _step_from_dict(data: Mapping[str, Any]) -> Step:
    _check_keys("plan step", data, Step)
    clean = None if data["clean"] is None else (float(data["clean"][0]), float(data["clean"][1]))
    update = tuple(Term(source, int(index), float(weight)) for source, index, weight in data["update"])
    return Step(**{**data, "clean": clean, "update": update})


def _check_keys(what: str, data: Mapping[str, Any], model: type) -> None:
    known = {entry.name for entry in fields(model)}
    if unknown := sorted(set(data) - known):
        raise UsageError(f"{what}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing := sorted(known - set(data)):
        raise UsageError(f"{what}: key {missing[0]!r} is missing")
