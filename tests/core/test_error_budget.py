"""The error over the steps splits exactly into what a step makes and what it inherits, and names the step at fault."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmd_export.error_budget import ErrorBudget, amplification, error_budget

Array = NDArray[Any]
GAINS = (2.0, 0.5, 3.0)


def noise(count: int = 4) -> Array:
    return np.random.default_rng(0).normal(size=(count, 1, 4, 4)).astype(np.float32)


def chain(start: Array, errors: tuple[float, ...], exact: list[Array] | None = None) -> list[Array]:
    """x -> gain x + error, from its own states, or from the exact ones."""
    states: list[Array] = []
    for k, (gain, error) in enumerate(zip(GAINS, errors, strict=True)):
        before = start if k == 0 else (states if exact is None else exact)[k - 1]
        states.append(gain * before + error)
    return states


def budget(errors: tuple[float, ...], tolerances: tuple[tuple[float, float], ...] = 3 * ((0.05, 0.0),)) -> ErrorBudget:
    start = noise()
    exact = chain(start, (0.0, 0.0, 0.0))
    return error_budget(start, exact, chain(start, errors), chain(start, errors, exact), tolerances)


def test_local_and_inherited_errors_are_the_constructed_ones() -> None:
    found = budget((0.01, 0.02, 0.03)).steps
    assert [each.local_max for each in found] == pytest.approx([0.01, 0.02, 0.03], rel=1e-4)
    totals = [0.01, 0.01 * 0.5 + 0.02, (0.01 * 0.5 + 0.02) * 3 + 0.03]
    assert [each.total_rms for each in found] == pytest.approx(totals, rel=1e-4)
    assert [each.inherited_max for each in found] == pytest.approx([0.0, 0.005, 0.075], rel=1e-4, abs=1e-7)
    assert found[0].growth is None
    assert found[2].growth == pytest.approx(totals[2] / totals[1], rel=1e-4)
    assert [each.gain for each in found[1:]] == pytest.approx(list(GAINS[1:]), rel=1e-4)
    assert [each.amplification for each in found] == pytest.approx(list(GAINS), rel=1e-5)


def test_the_step_that_is_wrong_by_itself_is_named() -> None:
    found = budget((0.01, 0.2, 0.01))
    assert (found.first_step, found.by_itself, found.largest_local) == (2, True, 2)


def test_errors_that_pile_up_are_told_from_a_wrong_step() -> None:
    found = budget((0.04, 0.04, 0.04))
    assert (found.first_step, found.by_itself) == (2, False)  # 0.04 * 0.5 + 0.04
    assert budget((1e-4, 1e-4, 1e-4)).first_step is None


def test_what_comes_after_the_step_that_breaks_adds_nothing_to_it() -> None:
    loose = (100.0, 0.0)
    found = budget((0.04, 0.03, 9.0), ((0.05, 0.0), (0.045, 0.0), loose))
    assert (found.first_step, found.by_itself, found.largest_local) == (2, False, 1)


def test_every_step_has_a_tolerance_of_its_own() -> None:
    errors, tight, loose = (0.2, 0.02, 0.02), (0.01, 0.0), (1.0, 0.0)
    assert budget(errors, (loose, tight, loose)).first_step == 2
    assert budget(errors, (loose, loose, loose)).first_step is None
    found = budget(errors, ((0.0, 1e6), tight, loose))  # what is relative widens it too
    assert (found.first_step, found.steps[0].local_required) == (2, 0.0)
    assert found.steps[0].local_max == pytest.approx(0.2, rel=1e-4)
    assert [(each["atol"], each["rtol"]) for each in found.to_dict()["steps"]] == [(0.0, 1e6), tight, loose]


def test_the_images_that_are_worst_are_named() -> None:
    """Image 2 is off most; beside a relative tolerance image 1 is, whose reference is small there."""
    start = noise(3)
    exact = [np.ones_like(start) * np.array([1.0, 0.01, 100.0]).reshape(3, 1, 1, 1)]
    off = [exact[0] + np.array([0.0, 0.1, 0.5]).reshape(3, 1, 1, 1)]
    (step,) = error_budget(start, exact, off, off, [(0.05, 0.01)]).steps
    assert (step.local_image, step.required_image) == (2, 1)
    assert step.local_required == pytest.approx(0.1 - 1e-4)
    off[0][0, 0, 0, 0] = np.nan
    (step,) = error_budget(start, exact, off, off, [(0.05, 0.01)]).steps
    assert (step.local_image, step.required_image, step.local_required) == (0, 0, np.inf)


def test_an_honest_chain_has_no_growth_to_report() -> None:
    found = budget((0.0, 0.0, 0.0))
    assert all(each.total_max == 0.0 and each.growth is None and each.gain is None for each in found.steps)


def test_a_state_that_is_no_number_is_infinite_and_json_null() -> None:
    start = noise()
    exact = chain(start, (0.0, 0.0, 0.0))
    free = chain(start, (0.0, 0.0, 0.0))
    free[1] = free[1].copy()
    free[1][0, 0, 0, 0] = np.nan
    found = error_budget(start, exact, free, exact, 3 * [(1e-3, 0.0)])
    assert found.first_step == 2
    rows = json.loads(json.dumps(found.to_dict(), allow_nan=False))["steps"]
    assert rows[1]["total_max"] is None
    assert rows[0]["total_max"] == 0.0


def test_one_image_has_no_pairs() -> None:
    assert amplification(noise(1), noise(1)) is None
    assert amplification(np.zeros((3, 1, 2, 2)), noise(3)) is None
