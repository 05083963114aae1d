"""Rung 7 on a few honest repeats; its power takes thousands of samples and is measured by the benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.distribution_rung import LEVEL, Lab, most_alarms, summary
from mmd_export.commands.distribution import DistributionOptions


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four repeats, each with an honest artefact and with one of the four that lack a step."""
    options = DistributionOptions(200, level=LEVEL, permutations=99)
    lab = Lab(tmp_path_factory.mktemp("few"), options)
    return summary([lab.repeat(number, power=True) for number in range(4)])


def test_honest_artefacts_pass(found: dict[str, Any]) -> None:
    assert found["false_alarms"] <= 1, found
    assert found["alarms_by_test"]["same"] == 0


def test_a_step_that_is_left_out_is_found(found: dict[str, Any]) -> None:
    """Each of the four, by the test on the same noises; few samples do."""
    assert found["power"] == 1.0, found
    assert found["found_by_test"]["same"] == 4
    assert sorted(found["power_by_step"]) == ["2", "3", "4", "5"]


def test_as_many_alarms_as_chance_allows() -> None:
    """P(X <= 15) = 0.9556 and P(X <= 14) = 0.9219 for X of Binomial(200, 0.05)."""
    assert most_alarms(200) == 15
    assert most_alarms(1, level=0.5, confidence=0.5) == 0


def test_a_summary_counts_what_failed() -> None:
    row = {"same": {"failed": True}, "fresh": {"failed": False}, "failed": True}
    fine = {"same": {"failed": False}, "fresh": {"failed": False}, "failed": False}
    found = summary([{"honest": fine, "dropped": row, "step": 2}, {"honest": row}])
    assert (found["false_alarm_rate"], found["power"]) == (0.5, 1.0)
    assert (found["few_alarms"], found["enough_power"]) == (True, True)
    assert (found["alarms_by_test"], found["power_by_step"]) == ({"same": 1, "fresh": 0}, {"2": 1.0})
    many = summary([{"honest": row, "dropped": fine, "step": 3}] * 3)
    assert (many["few_alarms"], many["enough_power"]) == (False, False)
