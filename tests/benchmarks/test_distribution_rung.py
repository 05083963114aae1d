"""Rung 7 on a few honest repeats; its power takes thousands of samples and is measured by the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.distribution_rung import LEVEL, Lab, summary
from mmd_export.commands.distribution import DistributionOptions


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    options = DistributionOptions(200, level=LEVEL, permutations=99)
    return Lab(tmp_path_factory.mktemp("few"), options)


def test_honest_artefacts_pass(few: Lab) -> None:
    found = summary([few.repeat(number, power=False) for number in range(4)])
    assert found["false_alarms"] <= 1, found
    assert found["each_test_alone"]["same"] == 0.0


def test_a_summary_counts_what_failed(tmp_path: Path) -> None:
    row = {"same": {"p": 0.01}, "fresh": {"p": 0.5}, "failed": True}
    fine = {"same": {"p": 1.0}, "fresh": {"p": 0.5}, "failed": False}
    found = summary([{"honest": fine, "dropped": row}, {"honest": row}])
    assert (found["false_alarm_rate"], found["power"]) == (0.5, 1.0)
