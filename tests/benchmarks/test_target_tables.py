"""The table of targets has a row for every cell of the study, measured or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS
from benchmarks.engines import reading
from benchmarks.target_tables import engine_rows, target_rows
from benchmarks.targets import MODELS, choices, target_of


def test_a_cell_that_is_missing_is_a_row_that_says_so() -> None:
    _, rows = target_rows({"cells": {f"{MODELS[0]} | onnx | fp32": {"failed": "its process crashed (SIGSEGV)"}}})
    assert len(rows) == len(MODELS) * sum(len(target_of(name).precisions) for name in choices())
    said = {row[:3]: row[-2] for row in rows}
    assert said["`onnx`", "`fp32`", MODELS[0]] == "its process crashed (SIGSEGV)"
    assert {said[row[:3]] for row in rows} == {"not measured yet", "its process crashed (SIGSEGV)"}


def test_reference_evaluation_of_core_ml_is_within_1e_5() -> None:
    """Arithmetic in float32 on both sides; Core ML on a device has a tolerance of 1e-4."""
    packages = json.loads((RESULTS / "coreml.json").read_text(encoding="utf-8"))["packages"]
    errors = {row["model"]: row["worst"] for row in packages if row["precision"] == "fp32"}
    assert len(errors) >= 2
    assert max(errors.values()) <= 1e-5


def test_engines_are_fractions_of_fp32_in_their_form(tmp_path: Path) -> None:
    def row(form: str, precision: str, size: int) -> dict[str, Any]:
        sizes = {"bytes": size, "packed_bytes": size // 2}
        engine = sizes | {"packed_bytes": 10**6, "unpacking_cpu_seconds": 0.26}
        return {"form": form, "precision": precision, "onnx": sizes, "tensorrt-rtx": engine}

    rows = [row("unrolled", "fp32", 8 * 10**6), row("unrolled", "int8", 2 * 10**6), row("loop", "fp32", 10**6)]
    _, found = engine_rows({"rows": rows})
    assert found[1] == ("unrolled, int8", "2.0 (0.25)", "1.0 (0.25)", "2.0 (0.25)", "1.0 (1.00)", "0.3")
    assert found[2] == ("loop, fp32", "1.0 (1.00)", "0.5 (1.00)", "1.0 (1.00)", "1.0 (1.00)", "0.3")
    (tmp_path / "model.plan").write_bytes(b"weights" * 10**6)
    assert 0.0 <= reading(tmp_path / "model.plan") < 5.0


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.52), ("int8", 0.30), ("fp8", 0.30)])
@pytest.mark.parametrize("form", ["unrolled", "loop"])
def test_packed_engines_shrink_with_their_precision(form: str, precision: str, most: float) -> None:
    rows = json.loads((RESULTS / "engines.json").read_text(encoding="utf-8"))["rows"]
    sizes = {row["precision"]: row["tensorrt-rtx"]["packed_bytes"] for row in rows if row["form"] == form}
    assert sizes[precision] <= most * sizes["fp32"]


def test_a_graph_that_was_not_compiled_says_how_it_ran() -> None:
    measured = {
        "deferred": True, "bytes": 2_000_000, "nodes": 9, "cpu_seconds": 3.0, "peak_memory_mb": 500, "tolerance": 0.01,
        "sample_error": 0.002, "worst_state_error": 0.003, "not_verified": "",
        "runtime": "onnxruntime 1", "where": "CPU",
    }  # fmt: skip
    silent = measured | {"sample_error": None, "worst_state_error": None, "not_verified": "no Mul in bf16"}
    cells = {f"{MODELS[0]} | tensorrt | fp16": measured, f"{MODELS[0]} | tensorrt | bf16": silent}
    rows = {row[:3]: row for row in target_rows({"cells": cells})[1]}
    fp16, bf16 = (rows["`tensorrt`", f"`{precision}`", MODELS[0]] for precision in ("fp16", "bf16"))
    assert fp16[3] == "2.00 MB, deferred"
    assert fp16[-2:] == ("not compiled here; its graph: onnxruntime 1", "CPU")
    assert bf16[-2:] == ("not compiled here; its graph not run: no Mul in bf16", "CPU")
