"""How large engines of TensorRT-RTX are, by form and precision, as files and packed -> benchmarks/results/engines.json.

The ddpm-cifar10 architecture, 5 steps, one compute capability. *Packed* engines are those of bundles built with
``--compress``, graphs are packed in the same way: code packs to a fraction, random weights hardly. The seconds are
those of reading the engine into memory. No GPU is needed, nothing is run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save_cifar10, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.target_options import DEFAULTS, TargetOptions
from mmd_export.trt.packing import pack, read_engine

STEPS, CAPABILITY = 5, "8.9"
FORMS = ("unrolled", "loop")
PRECISIONS = ("fp32", "fp16", "int8", "fp8")


def measure(model: Path, form: str, precision: str, folder: Path) -> dict[str, Any]:
    """One engine, and the graph that it was made of, each as it is and packed."""

    def bundle(target: str, name: str, of_target: TargetOptions) -> Bundle:
        options = BuildOptions(
            str(model), target, folder / name, precision,
            steps=STEPS, sampler="ddim", form=form, of_target=of_target, verify=False,
        )  # fmt: skip
        return build(options, lambda text: print(f"  {form} {precision}: {text}", flush=True))

    compiled = TargetOptions(compute_capability=CAPABILITY, cache=folder / "cache")
    graph, plain = bundle("onnx", "onnx", DEFAULTS), bundle("tensorrt-rtx", "plain", compiled)
    compressed = bundle("tensorrt-rtx", "packed", replace(compiled, compress=True))
    shutil.copyfile(graph.artefact_path, folder / "graph")
    pack(folder / "graph", folder / "graph.xz")
    return {
        "form": form,
        "precision": precision,
        "onnx": {"bytes": graph.artefact_bytes, "packed_bytes": (folder / "graph.xz").stat().st_size},
        "tensorrt-rtx": {
            "bytes": plain.artefact_bytes,
            "packed_bytes": compressed.artefact_bytes,
            "reading_cpu_seconds": reading(plain.artefact_path),
            "unpacking_cpu_seconds": reading(compressed.artefact_path),
        },
    }


def reading(path: Path) -> float:
    """CPU seconds of the shortest of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        read_engine(path)
        found.append(time.process_time() - start)
    return round(min(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json")
    parser.add_argument("--jobs", type=int, default=2, help="processes; sizes do not depend on it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = save_cifar10(Path(scratch) / "ddpm-cifar10", "v_prediction")
        asked = [(model, form, each, Path(scratch) / f"{form}-{each}") for form in FORMS for each in PRECISIONS]
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(measure, *zip(*asked, strict=True)))
    values = {"steps": STEPS, "compute_capability": CAPABILITY, "model": "ddpm-cifar10 architecture", "rows": rows}
    write_result(arguments.out, "benchmarks/engines.py", values)


if __name__ == "__main__":
    main()
