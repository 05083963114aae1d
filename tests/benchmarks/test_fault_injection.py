"""A few of the planted faults, one of every rung; the whole list is run by benchmarks/fault_injection.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_injection import Fault, all_faults, honest, judged
from benchmarks.faults import Lab

FAULTS = {fault.name: fault for fault in all_faults()}
CHOSEN = (
    "onnx: weight sign flipped, seed 0",
    "onnx: weight NaN, seed 5",
    "onnx: wrong coefficient in the graph, seed 1",
    "onnx: constant image, seed 0",
    "onnx: bytes truncated, not rounded, seed 0",
    "onnx: wrong coefficient in the plan, seed 0",
    "onnx: noise of another seed, seed 1",
    "onnx: wrong time table, seed 0",
    "onnx: wrong exported program, seed 0",
    "openvino: weight exponent bit flipped, seed 3",
)


def test_the_list_is_long_and_names_every_stage_and_target() -> None:
    faults = all_faults()
    assert len(faults) == len(FAULTS) >= 60
    assert {fault.target for fault in faults} == {"onnx", "openvino", "coreml"}
    assert {rung for fault in faults for rung in fault.rungs} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_planted_fault_is_caught_and_blamed_on_its_stage(lab: Lab, name: str) -> None:
    found = judged(FAULTS[name], lab)
    assert found["caught"], found
    assert found["right"], found


def test_no_fault_no_alarm(lab: Lab) -> None:
    """The same judge, on a bundle in which nothing was planted, catches nothing."""
    found = judged(Fault("none", "onnx", 0, (6,), lambda lab: lab.judge(lab.honest("onnx"))), lab)
    assert not found["caught"], found
    assert not found["right"]


def test_honest_bundles_raise_no_alarm(tmp_path: Path) -> None:
    found = honest("onnx", "int8", "1,4", "float32", range(3), tmp_path)
    assert (found["runs"], found["alarms"]) == (3, 0), found
    assert 0.0 < found["worst"] < found["atol"]
