"""The time of ``verify``: one real process, and a summary that tells a slow or a heavy one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.verify_time import LIMIT_SECONDS, STEPS, summary, verified
from mmd_export.build import BuildOptions, build


def test_a_fresh_process_verifies_and_imports_nothing_heavy(tmp_path: Path) -> None:
    bundle = build(BuildOptions("digits", "onnx", tmp_path / "digits", steps=STEPS, verify=False))
    found = verified(bundle.folder, tmp_path / "report.json")
    assert (found["code"], found["passed"], found["imported"]) == (0, True, [])
    assert found["verified_fraction"] == 1.0
    assert 0.0 < found["cpu_seconds"] < LIMIT_SECONDS  # of the processor: other tests run meanwhile


def test_a_slow_or_heavy_process_shows() -> None:
    fine = {"wall_seconds": 1.0, "cpu_seconds": 0.9, "imported": [], "passed": True, "code": 0}
    slow = fine | {"wall_seconds": 9.0, "imported": ["torch"], "passed": False}
    assert summary([fine])["within_limit"] == 1
    found = summary([fine, slow])
    assert (found["within_limit"], found["imported"], found["passed"]) == (1, ["torch"], False)
    assert found["wall_seconds"] == {"fastest": 1.0, "median": 5.0, "slowest": 9.0}
