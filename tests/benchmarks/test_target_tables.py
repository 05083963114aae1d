"""The table of targets has a row for every cell of the study, measured or not."""

from __future__ import annotations

from benchmarks.target_tables import target_rows
from benchmarks.targets import MODELS
from mmd_export.targets import get_target, target_names


def test_a_cell_that_is_missing_is_a_row_that_says_so() -> None:
    _, rows = target_rows({"cells": {f"{MODELS[0]} | onnx | fp32": {"failed": "its process crashed (SIGSEGV)"}}})
    assert len(rows) == len(MODELS) * sum(len(get_target(name).precisions) for name in target_names())
    said = {row[:3]: row[-1] for row in rows}
    assert said["`onnx`", "`fp32`", MODELS[0]] == "its process crashed (SIGSEGV)"
    assert {said[row[:3]] for row in rows} == {"not measured yet", "its process crashed (SIGSEGV)"}
