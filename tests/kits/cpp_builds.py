"""The C++ kit, configured and compiled as its README says, with the libraries of the Python packages.

TensorRT and CUDA are stand-ins in ``tensorrt/``: what the kit asks of them is compiled and run, NVIDIA's code is not.
"""

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
TENSORRT = Path(__file__).parent / "tensorrt"
SANITIZERS = {
    "TBB_ENABLE_SANITIZERS": "1",
    "LSAN_OPTIONS": f"print_suppressions=0:suppressions={Path(__file__).parent / 'known_leaks.txt'}",
}


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
    """Run it. OpenVINO's TBB loads a library in a way that the sanitizers refuse, unless it is told of them."""
    words, known = [str(word) for word in command], os.environ | SANITIZERS
    return subprocess.run(words, cwd=cwd, env=known | (environment or {}), capture_output=True, text=True, check=False)


def configure_and_build(sources: Path, into: Path, *options: str) -> Build:
    """Configure with warnings as errors and compile; the skip, or failure in CI, says what is missing."""
    command = ["cmake", "-S", sources, "-B", into, "-DMMD_WERROR=ON", *libraries(), *options]
    done = call(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "will run: onnx;openvino;pte;tensorrt" in done.stdout, done.stdout
    done = call(["cmake", "--build", into, "--parallel", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    return Build(into)


@cache
def libraries() -> tuple[str, ...]:
    """The options that name ONNX Runtime, OpenVINO and ExecuTorch as their Python packages have them, and stand-ins."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    missing += [name for name in ("onnxruntime", "openvino", "executorch") if importlib.util.find_spec(name) is None]
    if not list(HEADERS.rglob("onnxruntime_c_api.h")):
        missing.append("the header of ONNX Runtime")
    if missing:
        skip("kit", "cpp", f"{', '.join(missing)} missing; run .ci/kits, and make setup")
    (runtime,) = package("onnxruntime").glob("capi/libonnxruntime.so.*.*")
    return (
        f"-DONNXRUNTIME_ROOT={HEADERS}",
        f"-DONNXRUNTIME_LIBRARY={runtime}",
        f"-DOpenVINO_DIR={package('openvino') / 'cmake'}",
        f"-DCMAKE_PREFIX_PATH={package('executorch')}",
        f"-DTENSORRT_ROOT={TENSORRT}",
        "-Dtensorrt_library:STRING=m",  # one that is there; the stand-ins are headers alone
        f"-DCMAKE_MODULE_PATH={TENSORRT}",
    )


def package(name: str) -> Path:
    """Its folder; nothing of it is imported."""
    found = importlib.util.find_spec(name)
    assert found is not None
    return Path(next(iter(found.submodule_search_locations or ())))
