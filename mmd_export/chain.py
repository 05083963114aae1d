"""A StepPlan in numpy: the sampler round any network call. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmd_export.plan import StepPlan, Term

Images: TypeAlias = NDArray[np.float32]
Network: TypeAlias = Callable[[int, Images], Images]


def run_plan(plan: StepPlan, inputs: Mapping[str, NDArray[Any]], network: Network) -> Iterator[Images]:
    """``state.1`` ... ``state.K``, each (B, C, H, W); the docstring of ``mmd_export.plan`` has the formula.

    ``network(k, x)`` is the raw output of call k; ``inputs`` holds ``noise`` and, if stochastic, ``step_noise``.
    """
    known: dict[tuple[str, int], Images] = {("noise", s): noise for s, noise in enumerate(inputs.get("step_noise", ()))}
    known["state", 0] = np.float32(plan.initial_scale) * inputs["noise"]
    for k, step in enumerate(plan.steps):
        state = known["state", k]
        output = known["output", k] = network(k, state if step.scale == 1.0 else np.float32(step.scale) * state)
        if step.clean is not None and plan.clip is not None:
            a, b = (np.float32(number) for number in step.clean)
            known["clean", k] = np.clip(a * state + b * output, -plan.clip, plan.clip)
        known["state", k + 1] = weighted_sum(step.update, known)
        yield known["state", k + 1]


def weighted_sum(terms: tuple[Term, ...], known: Mapping[tuple[str, int], Images]) -> Images:
    """Sum of ``weight * known[source, index]`` in the order of ``terms``."""
    first, *rest = terms
    total = np.float32(first.weight) * known[first.source, first.index]
    for term in rest:
        total = total + np.float32(term.weight) * known[term.source, term.index]
    return total
