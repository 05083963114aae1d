"""Linear forms in the plan's symbols, so that a solver reads like its paper and comes out as a table.

A solver calls the network with ``table.call``, computes with the two forms it gets, and hands the next state back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmd_export.plan import PredictionType, Scalar, Source, Step, StepPlan, Term
from mmd_export.schedule import SchedulerConfig

NEGLIGIBLE_STD = 1e-10  # DDPMScheduler clamps the variance to 1e-20; a noise input for that would be a dead input
Symbol = tuple[Source, int]
_ORDER: tuple[Source, ...] = ("state", "output", "clean", "noise")


@dataclass(frozen=True)
class Form:
    """``sum of weight * symbol``, closed under +, - and multiplication by numbers."""

    weights: Mapping[Symbol, float] = field(default_factory=dict)

    def __add__(self, other: Form) -> Form:
        total = dict(self.weights)
        for symbol, weight in other.weights.items():
            total[symbol] = total.get(symbol, 0.0) + weight
        return Form(total)

    def __rmul__(self, number: float) -> Form:
        return Form({symbol: number * weight for symbol, weight in self.weights.items()})

    def __neg__(self) -> Form:
        return -1.0 * self

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def __truediv__(self, number: float) -> Form:
        return Form({symbol: weight / number for symbol, weight in self.weights.items()})

    def terms(self, k: int) -> tuple[Term, ...]:
        """The terms of step ``k``: its own state, output and guess first, then older ones, then noise."""

        def place(symbol: Symbol) -> tuple[bool, int, int]:
            source, index = symbol
            return source == "noise", k - index if source != "noise" else index, _ORDER.index(source)

        kept = [symbol for symbol, weight in self.weights.items() if weight != 0.0]
        terms = tuple(Term(*symbol, self.weights[symbol]) for symbol in sorted(kept, key=place))
        return terms or (Term("state", k, 0.0),)


class Table:
    """Collects the steps of one plan; ``clip`` is the range of the clean guesses, None leaves them alone."""

    def __init__(self, clip: float | None = None) -> None:
        self.clip = clip
        self._steps: list[Step] = []
        self._noises = 0
        self._pending: Step | None = None

    @property
    def k(self) -> int:
        """The call that is being written."""
        return len(self._steps)

    def call(self, timestep: float, alpha: float, sigma: float, scale: float = 1.0) -> tuple[Form, Form]:
        """One network call on ``scale * state``, which lies at the level (alpha, sigma): the state and the output."""
        self._pending = Step(float(timestep), alpha, sigma, (), None, scale)
        return Form({("state", self.k): 1.0}), Form({("output", self.k): 1.0})

    def clean(self, guess: Form) -> Form:
        """The clean guess of this call, clamped if the plan clamps."""
        if self.clip is None:
            return guess
        step, k = self._last, self.k
        assert set(guess.weights) <= {("state", k), ("output", k)}, "a clamped guess reads this call only"
        weights = guess.weights.get(("state", k), 0.0), guess.weights.get(("output", k), 0.0)
        self._pending = Step(step.timestep, step.alpha, step.sigma, (), weights, step.scale)
        return Form({("clean", k): 1.0})

    def noise(self, std: float) -> Form:
        """``std`` times a unit normal noise of its own, or nothing where ``std`` is negligible."""
        if abs(std) <= NEGLIGIBLE_STD:
            return Form()
        self._noises += 1
        return Form({("noise", self._noises - 1): std})

    def advance(self, state: Form) -> None:
        """End the call: ``state`` is the next state."""
        step = self._last
        self._steps.append(Step(step.timestep, step.alpha, step.sigma, state.terms(self.k), step.clean, step.scale))
        self._pending = None

    @property
    def _last(self) -> Step:
        assert self._pending is not None, "call() comes first"
        return self._pending

    def plan(
        self,
        solver: str,
        config: SchedulerConfig,
        steps: int,
        *,
        prediction: PredictionType | None = None,
        initial_scale: float = 1.0,
        settings: Mapping[str, Scalar] | None = None,
    ) -> StepPlan:
        """The plan; ``steps`` is diffusers' num_inference_steps and is noted where it is not the number of calls."""
        counts: dict[str, Scalar] = {}
        if steps != self.k:
            counts = {"num_inference_steps": steps, "calls": self.k}
        common: dict[str, Scalar] = {"timestep_spacing": config.timestep_spacing, "beta_schedule": config.beta_schedule}
        return StepPlan(
            solver=solver,
            prediction_type=prediction or config.prediction_type,
            steps=tuple(self._steps),
            clip=self.clip,
            initial_scale=initial_scale,
            settings={**common, **(settings or {}), **counts},
        )
