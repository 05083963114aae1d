"""``mmd-export doctor``: what is there, and whether it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmd_export.commands import doctor
from mmd_export.runtime import Availability
from mmd_runtime.registry import get_runtime
from tests.cli.conftest import Command

THERE = Availability(True, "of version 1")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Source of a package ``broken``, which processes started from here find before all others, also as onnxruntime."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "onnxruntime.py").write_text("from broken import *", encoding="utf-8")
    return tmp_path / "broken.py"


def test_a_package_that_does_not_import_is_broken(package: Path) -> None:
    package.write_text("raise ImportError('libmissing.so.1: cannot open')", encoding="utf-8")
    said: list[str] = []
    found = doctor.imported(THERE, ("json", "broken"), known := {}, said.append)
    assert found == Availability(
        False,
        "broken is there but broken: ImportError: libmissing.so.1: cannot open",
        "pip install --force-reinstall broken",
    )
    assert doctor.imported(THERE, ("broken",), known, said.append) == found
    assert said == ["importing json", "importing broken"]


def test_a_package_that_crashes_is_named_too(package: Path) -> None:
    package.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", encoding="utf-8")
    assert doctor.imported(THERE, ("broken",), {}).detail.endswith("its import crashed (SIGSEGV)")


def test_one_that_hangs_is_given_up(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("import time; time.sleep(600)", encoding="utf-8")
    monkeypatch.setattr(doctor, "_SECONDS", 1.0)
    assert doctor.imported(THERE, ("broken",), {}).detail.endswith("its import took more than 1 s")


def test_what_works_stays(package: Path) -> None:
    package.write_text("", encoding="utf-8")
    assert doctor.imported(THERE, ("broken", "json"), {}) is THERE


def test_the_command_tries_imports_when_asked(command: Command, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("raise OSError('no such device')", encoding="utf-8")
    monkeypatch.setattr(doctor, "target_names", list)
    monkeypatch.setattr(doctor, "every_runtime", lambda: [get_runtime("onnxruntime")])
    for flags, available in ((), True), (("--imports",), False):
        code, out, err = command("doctor", *flags, "--json", "-")
        assert code == 0
        (part,) = json.loads(out)["parts"]
        assert part["available"] is available
        assert ("importing onnxruntime" in err) is not available
    assert part["detail"] == "onnxruntime is there but broken: OSError: no such device"
    assert part["install"] == "pip install --force-reinstall onnxruntime"
