"""Whether a library is there and whole, told without importing it; a machine without a GPU."""

from __future__ import annotations

import ctypes.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmd_export.errors import NotAvailableError
from mmd_export.trt import device
from mmd_export.trt.library import RTX, TENSORRT, Library, system
from mmd_runtime import cuda
from mmd_runtime.registry import get_runtime

FAKE = replace(TENSORRT, name="mmd-fake-rt", modules=("mmd_fake_rt", "mmd_fake_rt_libs"), core="mmd_fake_core")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def put(folder: Path, *files: str) -> None:
    for file in files:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if path.name == "__init__.py" else b"native")


def test_what_is_not_installed_says_how_to_install_it(packages: Path) -> None:
    found = FAKE.installed()
    assert not found.available
    assert found.detail == "mmd-fake-rt is not installed"
    assert found.install == "pip install 'mmd-export[mmd-fake-rt]'"
    with pytest.raises(NotAvailableError, match="no package of it is installed; pip install"):
        _ = FAKE.version


def test_a_stub_is_told_from_the_real_thing(packages: Path) -> None:
    put(packages, "mmd_fake_rt/__init__.py")
    found = FAKE.installed()
    assert not found.available
    assert "without its Python extension and library mmd_fake_core: a stub" in found.detail
    assert "pip install" in found.install
    put(packages, "mmd_fake_rt/bindings.so")
    assert "without its library mmd_fake_core: a stub" in FAKE.installed().detail
    put(packages, "mmd_fake_rt_libs/__init__.py", "mmd_fake_rt_libs/libmmd_fake_core.so.11")
    assert FAKE.installed().available
    assert "mmd_fake_rt" not in sys.modules


def test_an_empty_library_is_a_stub_too(packages: Path) -> None:
    put(packages, "mmd_fake_rt/__init__.py", "mmd_fake_rt/bindings.pyd")
    (packages / "mmd_fake_rt" / "mmd_fake_core_11.dll").touch()
    assert "a stub" in FAKE.installed().detail
    (packages / "mmd_fake_rt" / "mmd_fake_core_11.dll").write_bytes(b"native")
    assert FAKE.installed().available


def test_a_library_of_the_system_counts(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(packages, "mmd_fake_rt/__init__.py", "mmd_fake_rt/bindings.so")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so" if name == FAKE.core else None)
    assert FAKE.installed().available


@pytest.mark.usefixtures("_rtx")
def test_the_installed_library_is_whole_and_stays_unloaded() -> None:
    found = RTX.installed()
    assert found.available
    assert RTX.version in found.detail
    assert "tensorrt_rtx" not in sys.modules


def test_no_driver_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert device.find_device() is None


@pytest.mark.parametrize("library", [TENSORRT, RTX])
def test_a_runtime_says_all_that_it_lacks(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmd_runtime.engines.find_device", lambda: None)
    monkeypatch.setattr("mmd_runtime.engines.installed", lambda: False)
    found = get_runtime(library.name).availability()
    assert not found.available
    assert "no NVIDIA GPU with a driver" in found.detail
    assert "cuda-python is not installed" in found.detail
    assert cuda.INSTALL in found.install
    assert "run it on a machine that has one" in found.install
    assert (library.installed().detail in found.detail) == (not library.installed().available)


def test_the_target_needs_a_gpu_only_where_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmd_export.runtime import Availability
    from mmd_export.targets.tensorrt import EngineTarget

    monkeypatch.setattr(Library, "installed", lambda self: Availability(True, f"{self.name} 1"))
    monkeypatch.setattr("mmd_export.targets.tensorrt.find_device", lambda: None)
    found = EngineTarget(TENSORRT).availability()
    assert not found.available
    assert "tensorrt 1, but no NVIDIA GPU" in found.detail
    assert EngineTarget(RTX).availability().available


def test_the_name_of_this_system() -> None:
    kind, _, machine = system().partition("-")
    assert kind in ("linux", "darwin", "windows")
    assert machine
