"""``mmd-export doctor``: what is there, and whether it works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mmd_export.commands import doctor
from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Runtime, uninstalled
from mmd_export.targets import Target, get_target, target_names
from mmd_runtime.registry import every_runtime, get_runtime
from tests.cli.conftest import Command


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Source of a package ``broken``, which processes started from here find before all others, also as onnxruntime."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "onnxruntime.py").write_text("from broken import *", encoding="utf-8")
    return tmp_path / "broken.py"


@pytest.mark.parametrize("part", [*map(get_target, target_names()), *every_runtime()], ids=lambda part: part.name)
def test_what_a_part_imports_is_a_module_that_can_fail(part: Target | Runtime) -> None:
    """A namespace package imports whatever is in it."""
    from importlib.util import find_spec

    there = [name for name in part.modules if not uninstalled([name])]
    if part.modules and not there:
        pytest.skip(f"none of {', '.join(part.modules)} is installed")
    for name in there:
        assert (spec := find_spec(name)) is not None
        assert spec.origin is not None


def test_a_package_that_does_not_import_is_broken(package: Path) -> None:
    package.write_text("raise ImportError('no such symbol')", encoding="utf-8")
    said: list[str] = []
    known: dict[str, str] = {}
    found = doctor.broken_import(("json", "broken"), known, said.append)
    assert found is not None
    assert not found.available
    assert found.detail == "broken is installed but does not import: ImportError: no such symbol"
    assert found.install == "install it again from where it came"
    assert doctor.broken_import(("broken",), known, said.append) == found
    assert said == ["importing json", "importing broken"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("import time; time.sleep(600)", "it took more than 1 s"),
    ],
)
def test_one_that_crashes_or_hangs(package: Path, source: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text(source, encoding="utf-8")
    monkeypatch.setattr(doctor, "_IMPORT_TIMEOUT", 1.0)
    assert (found := doctor.broken_import(("broken",), {})) is not None
    assert found.detail.endswith(why)


@pytest.mark.parametrize(
    ("versions", "why", "move"),
    [
        ({"broken": "1.2"}, "ImportError: no symbol", "pip install --force-reinstall --no-deps broken==1.2"),
        ({"broken": "1.2"}, "ModuleNotFoundError: no x", "pip install --force-reinstall broken==1.2"),
        ({"broken": "1.2+cpu"}, "ImportError: no symbol", r"install broken 1\.2\+cpu again from where it came"),
        ({"broken": "1", "broken-gpu": "1"}, "ImportError", "keep one of broken, broken-gpu, which overwrite each .*"),
        ({"broken": "1"}, "OSError: libx.so: cannot open shared object file", "install the library that it names: .*"),
    ],
)
def test_the_next_move(versions: dict[str, str], why: str, move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"broken": list(versions)})
    monkeypatch.setattr(doctor, "version", versions.__getitem__)
    monkeypatch.setattr(doctor, "why_not", lambda _: why)
    assert (found := doctor.broken_import(("broken",), {})) is not None
    assert re.fullmatch(move, found.install)


@pytest.mark.parametrize("source", ["raise ImportError", "raise OSError", "import os; os._exit(3)"])
def test_a_part_of_a_broken_package_is_installed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "__init__.py").write_text(source, encoding="utf-8")
    (tmp_path / "whole" / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert uninstalled(["whole.part", "json.decoder"]) == ""
    assert uninstalled(["whole.other", "whole.part.more", "no_such.part"]) == "whole, no_such"


def test_what_is_there_of_a_part_is_tried(package: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("raise ImportError('no symbol')", encoding="utf-8")
    part = get_runtime("onnxruntime")
    monkeypatch.setattr(part, "modules", ("no_such", "onnxruntime"))
    monkeypatch.setattr(doctor, "target_names", list)
    monkeypatch.setattr(doctor, "every_runtime", lambda: [part])
    code, out, _ = command("doctor", "--imports", "--json", "-")
    assert code == 0
    assert "onnxruntime is installed but does not import" in out


def test_what_works_is_not_broken(package: Path) -> None:
    package.write_text("", encoding="utf-8")
    assert doctor.broken_import(("broken", "json"), {}) is None


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sqlite3.py").write_text("raise ValueError", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert doctor.broken_import(("sqlite3",), {}) is None


def test_the_command_tries_imports_when_asked(command: Command, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("raise OSError('no such device')", encoding="utf-8")
    monkeypatch.setattr(doctor, "target_names", list)
    monkeypatch.setattr(doctor, "every_runtime", lambda: [get_runtime("onnxruntime"), get_runtime("onnxruntime:cpu")])
    for flags, available in ((), True), (("--imports",), False):
        code, out, err = command("doctor", *flags, "--json", "-")
        assert code == 0
        parts = json.loads(out)["parts"]
        assert [part["available"] for part in parts] == [available, available]
        assert ("importing onnxruntime" in err) is not available
    assert {part["detail"] for part in parts} == {
        "onnxruntime is installed but does not import: OSError: no such device"
    }


def test_a_provider_of_a_broken_onnxruntime_is_a_row(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise NotAvailableError("onnxruntime is not available here") from ImportError("no such symbol")

    monkeypatch.setattr("mmd_runtime.onnxruntime._onnxruntime", broken)
    monkeypatch.setattr(doctor, "target_names", list)
    monkeypatch.setattr(doctor, "every_runtime", lambda: [get_runtime("onnxruntime:cpu")])
    code, out, _ = command("doctor", "--json", "-")
    assert code == 0
    (part,) = json.loads(out)["parts"]
    assert not part["available"]
    assert part["detail"] == "onnxruntime does not import: no such symbol"
    assert part["install"] == "pip install --force-reinstall --no-deps onnxruntime"
