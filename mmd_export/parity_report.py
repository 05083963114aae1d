"""What the ladder found: rungs with their verdicts, what was compared and what was not. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmd_export.comparison import FORCED, FRESH, NO_LIMITS, Comparison, Limits
from mmd_export.distribution import TwoSampleTest
from mmd_export.error_budget import ErrorBudget
from mmd_export.errors import ParityError
from mmd_export.runtime import Placement

RUNGS = {
    1: "exact answers (Gaussian data, closed form)",
    2: "plan against diffusers' scheduler, float64",
    3: "unrolled sampler, float64 to float32",
    4: "specialised program",
    5: "exported program",
    6: "artefact in its runtime",
    7: "distribution of samples (MMD, permutation test)",
}
ARTEFACT = 6


@dataclass(frozen=True)
class Coverage:
    """What of an artefact rung 6 compared, each as (compared, of all).

    Args:
        outputs: of the graph.
        states: after step 1 ... K, free-running.
        steps: 1 ... K, teacher-forced.
        inputs: of the graph that were fed.
        batches: sizes that the bundle takes and that were run.
    """

    outputs: tuple[int, int]
    states: tuple[int, int]
    steps: tuple[int, int]
    inputs: tuple[int, int]
    batches: tuple[int, int]

    @property
    def fraction(self) -> float:
        """All that was compared of all there is."""
        pairs = (self.outputs, self.states, self.steps, self.inputs, self.batches)
        return sum(compared for compared, _ in pairs) / sum(of for _, of in pairs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: {"compared": pair[0], "of": pair[1]} for name, pair in asdict(self).items()}


@dataclass(frozen=True)
class Rung:
    """One stage of the ladder against the stage before it.

    ``skipped`` says why nothing was compared, ``unseen`` why the states inside an artefact were not; ``placement`` is
    where its nodes ran, if the runtime can tell. ``limits`` are tolerances from the command line. ``tests`` are those
    of rung 7; ``budget`` and ``coverage`` are those of rung 6.
    """

    number: int
    comparisons: tuple[Comparison, ...] = ()
    atol: float = 0.0
    skipped: str = ""
    sample_atol: float | None = None  # where the output is not of the states' scale (uint8)
    unseen: str = ""
    placement: Placement | None = None
    sample_mean: float = np.inf  # the same on average, where rounding may move a value by a whole level
    mean: float = np.inf  # of all else that is compared, on average
    limits: Limits = NO_LIMITS
    tests: tuple[TwoSampleTest, ...] = ()
    budget: ErrorBudget | None = None
    coverage: Coverage | None = None

    @property
    def title(self) -> str:
        """What this rung checks."""
        return RUNGS[self.number]

    def limit(self, comparison: Comparison) -> float:
        """The absolute tolerance of one comparison."""
        output = comparison.output
        if output == "sample" and self.sample_atol is not None:
            return self.limits.atol_of(output, self.sample_atol, named_only=True)
        return self.limits.atol_of(output, self.atol)

    def mean_limit(self, comparison: Comparison) -> float:
        """How far a comparison may be off on average; infinite where the user gives a tolerance instead."""
        output, given = comparison.output, self.limits
        if output == "sample" and self.sample_atol is not None:
            return np.inf if output in given.atol else self.sample_mean
        named = {output, ""} & {*given.atol, *given.rtol}
        return np.inf if named else self.mean

    @property
    def failures(self) -> tuple[Comparison, ...]:
        """The comparisons that do not pass."""
        return tuple(c for c in self.comparisons if not c.passes(self.limit(c), self.mean_limit(c)))

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it passes."""
        something = bool(self.comparisons or self.tests)
        return something and not self.failures and all(test.passed for test in self.tests)

    @property
    def verdict(self) -> str:
        """Passed, failed, or not checked."""
        return "not checked" if self.skipped else "passed" if self.passed else "failed"

    @property
    def worst(self) -> float:
        """The largest error of float values, faults aside; 0 where none was compared, as ``required_atol`` tells."""
        return max((c.max_abs for c in self._scaled), default=0.0)

    @property
    def required_atol(self) -> float | None:
        """The smallest absolute tolerance with which all would have passed; infinite if none would, None without any.

        Of float values; uint8 samples have their own in ``comparisons``, in levels.
        """
        return max((c.required_atol for c in self._scaled), default=None)

    @property
    def _scaled(self) -> list[Comparison]:
        return [c for c in self.comparisons if self.sample_atol is None or c.output != "sample"]

    def to_dict(self) -> dict[str, Any]:
        comparisons = [
            c.to_dict() | {"atol": self.limit(c), "passed": c.passes(self.limit(c), self.mean_limit(c))}
            for c in self.comparisons
        ]
        return {
            "rung": self.number, "title": self.title, "verdict": self.verdict, "atol": self.atol,
            "worst": _finite(self.worst) if self._scaled else None, "required_atol": _finite(self.required_atol),
            "skipped": self.skipped, "unseen": self.unseen, "comparisons": comparisons,
            "placement": None if self.placement is None else self.placement.to_dict(),
            "tests": [test.to_dict() for test in self.tests],
        }  # fmt: skip


@dataclass(frozen=True)
class Culprit:
    """Where an artefact breaks its budget, from step to operator; empty where it was not looked further.

    Args:
        step: k, counted from 1; K + 1 stands for what follows the last step.
        block: the part of the network, by the names of its weights, or ``plan`` for the sampler's own arithmetic.
        operator: what computes ``value`` in the artefact.
        value: the first value with which the step breaks the budget.
        weights: those that the operator reads.
        expected: what computes it in the reference graph, if that differs.
        error: of the step's result with everything up to ``value`` from the artefact and the rest exact.
        before: the same with everything before it.
        budget: what the step's result may be off.
        note: what else there is to say.
        evaluations: how many hybrids of both graphs were run.
    """

    step: int
    block: str = ""
    operator: str = ""
    value: str = ""
    weights: tuple[str, ...] = ()
    expected: str = ""
    error: float = np.inf
    before: float = 0.0
    budget: float = 0.0
    note: str = ""
    evaluations: int = 0

    @property
    def message(self) -> str:
        """One line, from the step down."""
        parts = [f"step {self.step}"]
        if self.block:
            parts.append(f"block {self.block}")
        if self.operator:
            weights = f" with {', '.join(self.weights)}" if self.weights else ""
            expected = f" (the reference has {self.expected})" if self.expected else ""
            parts.append(f"operator {self.operator}, value {self.value}{weights}{expected}")
            parts.append(f"error {self.before:.2g} before, {self.error:.2g} with it, budget {self.budget:.2g}")
        return ": ".join(parts) + (f"; {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        numbers = {name: _finite(getattr(self, name)) for name in ("error", "before", "budget")}
        return {**asdict(self), **numbers, "weights": list(self.weights), "message": self.message}


@dataclass(frozen=True)
class ParityReport:
    """Every rung that was asked for, in order. ``detail`` says what the runtime is.

    ``unchecked``: what else was not looked at; ``culprit``: what ``--bisect`` found; ``artefact_sha256``: the bundle's;
    ``advice``: the next move where rung 6 fails as an honest device may.
    """

    bundle: str
    runtime: str
    rungs: tuple[Rung, ...]
    detail: str = ""
    unchecked: tuple[str, ...] = ()
    culprit: Culprit | None = None
    artefact_sha256: str = ""
    advice: str = ""

    @property
    def passed(self) -> bool:
        """Whether no rung failed and the artefact itself was compared."""
        checked = [rung for rung in self.rungs if not rung.skipped]
        return all(rung.passed for rung in checked) and any(rung.number == ARTEFACT for rung in checked)

    @property
    def artefact(self) -> Rung | None:
        """Rung 6, if it is there."""
        return next((rung for rung in self.rungs if rung.number == ARTEFACT), None)

    @property
    def verified_fraction(self) -> float:
        """The share of the artefact's outputs, states, steps, inputs and batch sizes compared, see ``Coverage``."""
        rung = self.artefact
        return 0.0 if rung is None or rung.coverage is None else rung.coverage.fraction

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What was not looked at and why, each once."""
        lines = []
        for reason in dict.fromkeys(rung.skipped for rung in self.rungs if rung.skipped):
            numbers = ", ".join(str(rung.number) for rung in self.rungs if rung.skipped == reason)
            lines.append(f"rung {numbers}: {reason}")
        lines += [f"states and single steps: {rung.unseen}" for rung in self.rungs if rung.unseen]
        return (*lines, *self.unchecked)

    def require(self) -> None:
        """Raise ParityError that names the first rung and comparison that fail."""
        for rung in self.rungs:
            if rung.verdict == "failed":
                found = f"; {self.culprit.message}" if self.culprit is not None else ""
                found += f"; {self.advice}" if self.advice and rung.number == ARTEFACT else ""
                raise ParityError(
                    f"bundle {self.bundle}: rung {rung.number} ({rung.title}) failed: {_reason(rung)}{found}"
                )
        if not self.passed:
            raise ParityError(f"bundle {self.bundle}: the artefact was not compared with its golden file")

    def to_dict(self) -> dict[str, Any]:
        rung = self.artefact
        budget, coverage = (None, None) if rung is None else (rung.budget, rung.coverage)
        return {
            "bundle": self.bundle, "artefact_sha256": self.artefact_sha256,
            "runtime": self.runtime, "detail": self.detail, "passed": self.passed,
            "rungs": [each.to_dict() for each in self.rungs],
            "verified_fraction": self.verified_fraction,
            "verified": None if coverage is None else coverage.to_dict(),
            "not_checked": list(self.not_checked),
            "error_budget": None if budget is None else budget.to_dict(),
            "bisect": None if self.culprit is None else self.culprit.to_dict(),
        }  # fmt: skip


def _finite(number: float | None) -> float | None:
    return number if number is not None and np.isfinite(number) else None


def _reason(rung: Rung) -> str:
    for test in rung.tests:
        if not test.passed:
            tolerated = "" if test.tolerated is None else f", tolerated is an MMD^2 of {test.tolerated:.3g}"
            return (
                f"on {test.noise} noise MMD^2 is {test.mmd2:.3g} in {test.features}, Frechet distance "
                f"{test.frechet:.3g}, p {test.p_value:.3g} at level {test.level:g}{tolerated}"
            )
    if not rung.failures:
        return "nothing was compared"
    first = rung.failures[0]
    if first.faults:
        return f"{first.name}: {first.faults[0]}{_blame(rung)}"
    limit, mean = rung.limit(first), rung.mean_limit(first)
    if first.required_atol <= limit:
        return f"{first.name} is off by {first.mean_abs:.3g} on average, the tolerance is {mean:.3g}{_blame(rung)}"
    relative = f" beyond {first.rtol:g} relative" if first.rtol else ""
    off = f"{first.name} is off by {first.required_atol:.3g}{relative} at {first.worst_index}"
    return f"{off}, the tolerance is {limit:g}{_blame(rung)}"


def _blame(rung: Rung) -> str:
    """The first step that is wrong by itself, else the first whose state is."""
    names = [c.name for c in rung.failures if c.output.startswith("state.")]
    steps = [name for name in names if name.endswith(FORCED)] or names
    golden = [name for name in steps if not name.startswith(FRESH)] or steps
    return f"; the chain goes wrong at {golden[0]}" if golden and golden[0] != rung.failures[0].name else ""
