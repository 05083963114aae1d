"""A result file of several parts says of each in which environment it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coreml
from benchmarks.reference_tables import result_rows

OLD, NEW = ({"cpu": cpu, "cores": 2, "packages": {"torch": torch}} for cpu, torch in (("old", "2.11"), ("new", "2.13")))


@pytest.mark.parametrize(
    "environments",
    [{"environment": OLD}, {"environment": NEW, "environments": {"packages": OLD, "norms": NEW}}],
    ids=["a file of before", "a file with parts"],
)
@pytest.mark.parametrize("packages", [[], [{"model": "digits"}]], ids=["no package", "a package"])
def test_norms_alone_leave_the_packages_and_their_environment(
    packages: list[Any], environments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "coreml.json"
    path.write_text(json.dumps({"steps": 5, "packages": packages, "norms": [], **environments}))
    monkeypatch.setattr(coreml, "package", lambda *_: pytest.fail("a package was measured"))
    monkeypatch.setattr(coreml, "norms", lambda: ["measured"])
    monkeypatch.setattr(coreml, "environment", lambda: NEW)
    monkeypatch.setattr("sys.argv", ["coreml", "--norms", "--out", str(path)])
    coreml.main()
    written = json.loads(path.read_text())
    assert (written["steps"], written["packages"], written["norms"]) == (5, packages, ["measured"])
    assert written["environments"] == {"packages": OLD, "norms": NEW}


def test_a_file_whose_parts_come_from_two_machines_has_two_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.reference_tables.RESULTS", tmp_path)
    files: dict[str, dict[str, Any]] = {
        "a.json": {"environment": NEW, "environments": {"x": OLD, "y": NEW, "z": OLD}},
        "b.json": {"environment": OLD, "environments": {"x": NEW, "y": NEW}},
        "c.json": {"environment": OLD},
        "d.json": {"environments": {"denoiser": {"threads": 2}, "encoder": {"threads": 1}}},
    }
    for name, result in files.items():
        (tmp_path / name).write_text(json.dumps({"script": "benchmarks/s.py", **result}))
    assert result_rows()[1] == [
        ("`a.json`: x, z", "`benchmarks.s`", "old, 2 cores", "torch 2.11"),
        ("`a.json`: y", "`benchmarks.s`", "new, 2 cores", "torch 2.13"),
        ("`b.json`", "`benchmarks.s`", "new, 2 cores", "torch 2.13"),
        ("`c.json`", "`benchmarks.s`", "old, 2 cores", "torch 2.11"),
        ("`d.json`: denoiser", "`benchmarks.s`", "a CPU, 2 threads", ""),
        ("`d.json`: encoder", "`benchmarks.s`", "a CPU, 1 threads", ""),
    ]
