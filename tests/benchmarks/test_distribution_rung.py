"""Rung 7 on a few honest repeats; its power takes thousands of samples and is measured by the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.distribution_rung import LEVEL, Lab, most_alarms, summary
from mmd_export.commands.distribution import DistributionOptions


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    options = DistributionOptions(200, level=LEVEL, permutations=99)
    return Lab(tmp_path_factory.mktemp("few"), options)


def test_honest_artefacts_pass(few: Lab) -> None:
    found = summary([few.repeat(number, power=False) for number in range(4)])
    assert found["false_alarms"] <= 1, found
    assert found["each_test_alone"]["same"] == 0.0


def test_as_many_alarms_as_chance_allows() -> None:
    """P(X <= 15) = 0.9556 and P(X <= 14) = 0.9219 for X of Binomial(200, 0.05)."""
    assert most_alarms(200) == 15
    assert most_alarms(1, level=0.5, confidence=0.5) == 0


def test_a_summary_counts_what_failed() -> None:
    row = {"same": {"p": 0.01}, "fresh": {"p": 0.5}, "failed": True}
    fine = {"same": {"p": 1.0}, "fresh": {"p": 0.5}, "failed": False}
    found = summary([{"honest": fine, "dropped": row}, {"honest": row}])
    assert (found["false_alarm_rate"], found["power"]) == (0.5, 1.0)
    assert (found["few_alarms"], found["enough_power"]) == (True, True)
    many = summary([{"honest": row, "dropped": fine}] * 3)
    assert (many["few_alarms"], many["enough_power"]) == (False, False)
