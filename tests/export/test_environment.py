"""What is recorded beside timings, and what makes two of them of one machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from mmd_export import environment
from mmd_export.environment import describe_environment, machine


def test_the_environment_is_json_without_host_or_path() -> None:
    found = describe_environment()
    text = json.dumps(found)
    assert found["cores"] == os.cpu_count()
    assert platform.node() not in text.split('"')
    assert str(Path.home()) + "/" not in text


def test_a_machine_is_told_by_its_hardware_alone() -> None:
    first, second = describe_environment(), describe_environment()
    second |= {"load_before": [9.0, 9.0, 9.0], "platform": first["platform"].replace(platform.release(), "99.9")}
    assert machine(first) == machine(second)
    assert machine(first) != machine(first | {"gpu": {"name": "another"}})
    assert machine(first) != machine(first | {"cores": 999})


def test_a_clock_that_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_CLOCKS", tmp_path)
    assert describe_environment()["governor"] is None
    (tmp_path / "scaling_governor").write_text("performance\n")
    (tmp_path / "scaling_cur_freq").write_text("2400000\n")
    found = describe_environment()
    assert (found["governor"], found["clock_mhz"]) == ("performance", 2400.0)
