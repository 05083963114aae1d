"""The C++ kit, configured and compiled as its README says, with the libraries of the Python packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.contract.required import skip
from tests.project.checks import ROOT

HEADERS = ROOT / ".cache/onnxruntime"  # .ci/kits puts them there


@dataclass(frozen=True)
class Build:
    """A configured project and its binaries."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "mmd_sample"

    @property
    def library(self) -> Path:
        return self.folder / "libmmd_bundle.so"

    def run(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return call([self.program, *arguments], cwd)


def call(
    command: list[object], cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )


def configure_and_build(sources: Path, into: Path, *options: str) -> Build:
    """Configure with warnings as errors and compile; the skip, or failure in CI, says what is missing."""
    command = ["cmake", "-S", sources, "-B", into, "-DMMD_WERROR=ON", *libraries(), *options]
    done = call(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "will run: onnx;openvino" in done.stdout, done.stdout
    done = call(["cmake", "--build", into, "--parallel", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    return Build(into)


@cache
def libraries() -> tuple[str, ...]:
    """The options that name ONNX Runtime and OpenVINO as the Python packages have them."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    missing += [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is None]
    if not list(HEADERS.rglob("onnxruntime_c_api.h")):
        missing.append("the header of ONNX Runtime")
    if missing:
        skip("kit", "cpp", f"{', '.join(missing)} missing; run .ci/kits, and make setup")
    (runtime,) = package("onnxruntime").glob("capi/libonnxruntime.so.*.*")
    return (
        f"-DONNXRUNTIME_ROOT={HEADERS}",
        f"-DONNXRUNTIME_LIBRARY={runtime}",
        f"-DOpenVINO_DIR={package('openvino') / 'cmake'}",
    )


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
