"""The C++ kit against the Python runtime on one bundle, in one interleaved run -> benchmarks/results/cpp_kit.json.

The kit is compiled as its README says, as a shared library, and called through its C interface from this process, so
that both meet the same machine in every round. Both run the same ``model.onnx`` in the same release of ONNX Runtime
with as many threads; what differs is what stands around it. The ddpm-cifar10 architecture (random weights, v
prediction), batch 1, and digits, whose run is so short that the call itself shows.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, save_cifar10, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.latency import measure
from mmd_export.runtime import RunOptions
from mmd_runtime.registry import get_runtime
from tests.kits.cpp_builds import configure_and_build

STEPS = 5
ROUNDS = {"digits": 2000, "ddpm-cifar10 architecture": 60}
WARMUP = 5  # both call the same library; the first runs alone are slow


class Tensor(ctypes.Structure):
    """``mmd_tensor`` of mmd_bundle.h."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("dtype", ctypes.c_int), ("rank", ctypes.c_size_t),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("data", ctypes.c_void_p),
    )  # fmt: skip


def times(bundle: Bundle, library: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of both on the first golden noise, and how far their images are apart."""
    noise = np.ascontiguousarray(bundle.golden().noise[:1])
    session = get_runtime("onnxruntime").open(bundle, RunOptions(threads=threads))
    kit, sampler = ctypes.CDLL(str(library)), ctypes.c_void_p()
    kit.mmd_last_error.restype = ctypes.c_char_p
    if kit.mmd_open(str(bundle.folder).encode(), threads, ctypes.byref(sampler)):
        raise RuntimeError(kit.mmd_last_error().decode())
    shape = (ctypes.c_int64 * noise.ndim)(*noise.shape)
    given, images = Tensor(b"noise", 0, noise.ndim, shape, noise.ctypes.data), np.zeros_like(noise)
    place, size = images.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(images.nbytes)

    def in_cpp() -> None:
        if kit.mmd_run(sampler, ctypes.byref(given), ctypes.c_size_t(1), place, size):
            raise RuntimeError(kit.mmd_last_error().decode())

    report = measure({"cpp": in_cpp, "python": lambda: session.run({"noise": noise})}, rounds, WARMUP)
    apart = float(np.abs(images - session.run({"noise": noise})["sample"]).max())
    kit.mmd_close(sampler)
    medians = {name: report.summary(name).median for name in report.seconds}
    return {
        "rounds": report.rounds, "median_seconds": medians, "ratio": vars(report.ratio("cpp", "python")),
        "images_apart": apart,
    }  # fmt: skip


def bundle_of(model: str, out: Path) -> Bundle:
    """Built, unless an earlier run left it there."""
    if out.exists():
        return Bundle.open(out)
    source = model if model == "digits" else str(save_cifar10(out.with_suffix(".model"), "v_prediction"))
    return build(BuildOptions(source, "onnx", out, steps=STEPS, sampler="ddim", verify=False), print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for what is built, used again if it is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpp_kit.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        library = configure_and_build(ROOT / "runtimes/cpp", folder / "build", "-DBUILD_SHARED_LIBS=ON").library
        for model, rounds in ROUNDS.items():
            bundle = bundle_of(model, folder / model.split(" ", maxsplit=1)[0])
            results[model] = times(bundle, library, arguments.threads, max(6, int(arguments.share * rounds)))
            print(model, results[model])
    write_result(
        arguments.out, "benchmarks/cpp_kit.py", {"steps": STEPS, "threads": arguments.threads, "models": results}
    )


if __name__ == "__main__":
    main()
