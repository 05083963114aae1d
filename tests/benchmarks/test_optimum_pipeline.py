"""The measurement of optimum, without optimum: its pins, the packages that it counts, its tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import optimum_worker
from benchmarks.common import ROOT
from benchmarks.optimum_pipeline import REQUIREMENTS, ROOTS, required
from benchmarks.optimum_tables import call_rows, shipped_rows
from benchmarks.optimum_worker import FIXED, GRAPH, PIPELINE, SESSIONS

SAME = {"numpy", "onnx", "onnxruntime", "pydantic", "safetensors", "torch"}


def pins(file: Path) -> set[str]:
    return {line for line in file.read_text(encoding="utf-8").splitlines() if line.split("==")[0] in SAME}


def test_both_sides_run_in_the_versions_of_the_project() -> None:
    assert pins(REQUIREMENTS) == pins(ROOT / "constraints.txt")
    assert len(pins(REQUIREMENTS)) == len(SAME)


def install(site: Path, name: str, *requires: str) -> None:
    folder = site / f"{name}-1.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(lines), encoding="utf-8")


def test_what_pip_installs_is_followed_through_extras_and_markers(tmp_path: Path) -> None:
    install(tmp_path, "app", "Some.Library[fast]>=1", "old; python_version < '3'", "tests; extra == 'test'")
    install(tmp_path, "some_library", "base", "speedups; extra == 'fast'", "app")
    for name in ("base", "speedups", "tests", "unrelated"):
        install(tmp_path, name)
    assert list(required(("app",), [str(tmp_path)])) == ["app", "base", "some-library", "speedups"]
    assert "tests" in required(("app[test]",), [str(tmp_path)])


def test_a_bundle_runs_without_torch() -> None:
    found = required(ROOTS[GRAPH], sys.path)
    assert {"mmd-export", "numpy", "onnxruntime"} <= found.keys()
    assert not {"torch", "diffusers", "transformers", "onnx"} & found.keys()


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_images_that_differ_are_not_timed(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = np.zeros((1, 3, 2, 2), np.float32), np.full((1, 2, 2, 3), (wrong + 1) / 2, np.float32)
    monkeypatch.setattr(optimum_worker, "calls", lambda *_: {GRAPH: lambda: ours, PIPELINE: lambda: theirs})
    with pytest.raises(SystemExit, match="nothing was timed"):
        optimum_worker.measure(Path("exported"), Path("bundle"), 6)


def result() -> dict[str, Any]:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 0.1, "high": median + 0.1}

    model = {
        "takes": {PIPELINE: ratio(1.2), SESSIONS: ratio(0.9)},
        "processor_time": {SESSIONS: ratio(1.1), FIXED: ratio(1.0)},
        "loading": ratio(3.0),
        "largest_difference": 2e-6,
        "opened": {PIPELINE: {"sessions": 4, "peak_memory_mb": 600}, GRAPH: {"sessions": 1, "peak_memory_mb": 300}},
        "shipped": {
            PIPELINE: {"files": 14, "bytes": 2_000_000, "bytes_of_the_timed_call": 1_500_000},
            GRAPH: {"files": 4, "bytes": 1_400_000, "bytes_of_the_timed_call": 1_300_000},
        },
    }
    packages = {PIPELINE: {"count": 41, "bytes": 1_031_000_000}, GRAPH: {"count": 20, "bytes": 173_000_000}}
    return {"steps": 5, "models": {"small": model, "large": model}, "packages": packages}


def test_the_tables_say_what_was_measured() -> None:
    heads, calls = call_rows(result())
    assert heads[1:] == ("small", "large")
    assert [row[1].split()[0] for row in calls] == ["1.20", "0.90", "1.10", "1.00", "3.00", "2e-06"]
    assert calls[0][2] == "1.20 [1.10, 1.30]"
    heads, shipped = shipped_rows(result())
    assert heads == ("large", PIPELINE, GRAPH)
    assert [row[1:] for row in shipped] == [
        ("14", "4"), ("2.0 (1.5)", "1.4 (1.3)"), ("4", "1"), ("600", "300"), ("41", "20"), ("1,031", "173"),
    ]  # fmt: skip
