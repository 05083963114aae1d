"""From a failing step down to the operator: hybrids of the artefact's graph and an exact one. onnx_ir, no torch.

Both graphs call their values by the same names. A hybrid takes everything up to some value from the artefact and the
rest from the reference. Its error is 0 where nothing, and the artefact's own where everything comes from the artefact;
the value with which it first passes the budget is found by binary search, over blocks and then inside one. So the
operator named is the one after which exact arithmetic cannot save the step any more, whatever the precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.errors import NotAvailableError
from mmd_export.graph_parts import DECODER, PLAN, GraphParts, weights_of
from mmd_export.parity_report import Culprit, Rung

Array = NDArray[Any]
_LEAST_SHARED = 0.5  # of the values that the step needs; below that the graphs are of different toolchains


@dataclass(frozen=True)
class Question:
    """A step of a sampler: from ``known`` values to ``goal``, which should be ``expected`` within ``budget``.

    Its error is the largest |goal - expected| - ``rtol`` |expected|, as in a comparison.
    """

    step: int
    known: Mapping[str, Array]
    goal: str
    expected: Array
    budget: float
    note: str = ""
    rtol: float = 0.0


class _Hybrids:
    """The error of the goal with the first i shared values from the artefact."""

    def __init__(self, artefact: GraphParts, reference: GraphParts, question: Question) -> None:
        self.artefact, self.reference, self.question = artefact, reference, question
        needed = reference.needed(question.known, question.goal)
        self.shared = [name for name in needed if name in artefact.producer]
        if not self.shared or self.shared[-1] != question.goal or len(self.shared) < _LEAST_SHARED * len(needed):
            raise NotAvailableError(
                f"--bisect: the graphs share {len(self.shared)} of {len(needed)} values of step {question.step}; the "
                "artefact comes from another toolchain, build it again"
            )
        self.errors: dict[int, float] = {}

    def error(self, count: int) -> float:
        """Of the question; infinite where the goal is not finite."""
        if count not in self.errors:
            self.errors[count] = self._error(count)
        return self.errors[count]

    def _error(self, count: int) -> float:
        known, goal, expected = self.question.known, self.question.goal, self.question.expected.astype(np.float64)
        taken = set(self.shared[:count])
        given = self.artefact.run(known, sorted(self.reference.read(taken | set(known), goal) - set(known)))
        exact = {name: _as_float32(array) for name, array in given.items()}
        result = self.reference.run({**known, **exact}, [goal])[goal]
        if result.shape != expected.shape or not np.isfinite(result).all():
            return np.inf
        error = np.abs(result.astype(np.float64) - expected)
        return float((error - self.question.rtol * np.abs(expected)).max(initial=0.0))


def find(artefact: ir.Model, reference: ir.Model, question: Question) -> Culprit:
    """The block and operator with which a step breaks its budget; without them if the step as a whole keeps it."""
    parts = GraphParts(artefact), GraphParts(reference)
    hybrids = _Hybrids(*parts, question)
    everything, budget = len(hybrids.shared), question.budget
    whole, nothing = hybrids.error(everything), hybrids.error(0)
    found = Culprit(question.step, budget=budget, error=whole, before=nothing, note=question.note)
    if not nothing <= budget:
        note = "a fresh float32 graph of the checkpoint breaks the budget too: look at rungs 1 to 5"
        return replace(found, note=note, evaluations=len(hybrids.errors))
    if whole <= budget:
        note = f"alone, step {question.step} keeps it in onnxruntime; it breaks it in the runtime that was verified"
        return replace(found, note=note, evaluations=len(hybrids.errors))
    ends = _block_ends([parts[1].labels.get(name, PLAN) for name in hybrids.shared])
    low, high = _search(hybrids, [0, *ends])
    low, high = _search(hybrids, list(range(low, high + 1)))
    return _named(hybrids, found, low, high)


def _search(hybrids: _Hybrids, cuts: Sequence[int]) -> tuple[int, int]:
    """Two neighbours in ``cuts``, ascending: the budget holds at the first and breaks at the second."""
    low, high = 0, len(cuts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if hybrids.error(cuts[middle]) <= hybrids.question.budget:
            low = middle
        else:
            high = middle
    return cuts[low], cuts[high]


def _block_ends(labels: Sequence[str]) -> list[int]:
    """The number of values up to the end of each run of equal labels."""
    ends, total = [], 0
    for _, run in groupby(labels):
        total += len(list(run))
        ends.append(total)
    return ends


def _named(hybrids: _Hybrids, found: Culprit, low: int, high: int) -> Culprit:
    value, before = hybrids.shared[high - 1], set(hybrids.shared[:low]) | set(hybrids.question.known)
    ours, theirs = (parts.between(before, value) for parts in (hybrids.artefact, hybrids.reference))
    operators, expected = ([node.op_type for node in nodes] for nodes in (ours, theirs))
    return replace(
        found,
        block=hybrids.reference.labels.get(value, PLAN),
        operator=", ".join(operators),
        value=value,
        weights=weights_of(ours),
        expected=", ".join(expected) if operators != expected else "",
        error=hybrids.error(high),
        before=hybrids.error(low),
        evaluations=len(hybrids.errors),
    )


def call_value(culprit: Culprit) -> str:
    """The name of the value inside one network call, as precisions know it; empty for the plan and the decoder."""
    prefix, slash, name = culprit.value.partition("/")
    is_call = slash and prefix.startswith("step.") and culprit.block not in (PLAN, DECODER)
    return name if is_call else ""


def _as_float32(array: Array) -> Array:
    """What the exact graph reads: 16-bit floats widened."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iub" else array


def asked_step(rung: Rung) -> tuple[int, bool]:
    """The step to look into, K + 1 for what follows the last state, and whether it breaks its tolerance by itself.

    The first step that is wrong by itself; where errors pile up, or where nothing but the mean of a state is too large,
    the one that adds most; where all states hold, what follows them. Raises NotAvailableError if none was seen, and
    ValueError if the rung passes, as no step is to blame then.
    """
    if rung.passed:
        raise ValueError("rung 6 passes, so no step breaks it")
    budget = rung.budget
    if budget is None:
        raise NotAvailableError("--bisect needs the states inside the artefact, which this runtime does not show")
    if budget.first_step is not None and budget.by_itself:
        return budget.first_step, True
    if budget.first_step is not None or any(each.output != "sample" for each in rung.failures):
        return budget.largest_local, False
    return len(budget.steps) + 1, not all(each.passes(rung.limit(each)) for each in rung.failures)


def question_of(rung: Rung, inputs: Mapping[str, Array], states: Sequence[Array], sample: Array) -> Question:
    """What to ask of a failing rung 6, on one batch of golden ``inputs``, ``states`` and ``sample``.

    A step that does not break its tolerance by itself has half of its largest error as budget.
    """
    step, by_itself = asked_step(rung)
    budget = rung.budget
    assert budget is not None  # asked_step has seen it
    known = {**inputs, **{f"state.{k}": state for k, state in enumerate(states[: step - 1], start=1)}}
    if step > len(budget.steps):
        compared = [each for each in rung.comparisons if each.output == "sample"]
        atol, rtol, largest = rung.limit(compared[0]), rung.limits.rtol_of("sample"), max(c.max_abs for c in compared)
        question = Question(step, known, "sample", sample, atol, "all states hold", rtol)
    else:
        error = budget.steps[step - 1]
        largest = error.local_max
        question = Question(step, known, f"state.{step}", states[step - 1], error.atol, "", error.rtol)
    if by_itself:
        return question
    why = "every value holds, their mean does not"
    if budget.first_step is not None:
        why = f"no step breaks {budget.steps[budget.first_step - 1].atol:.2g} alone, errors pile up to it"
    return replace(question, budget=largest / 2.0, note=f"{why}; step {step} adds most, {largest:.2g}", rtol=0.0)
