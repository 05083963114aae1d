"""How large engines of TensorRT-RTX are, by form and precision, as files and packed -> benchmarks/results/engines.json.

The ddpm-cifar10 architecture, 5 steps, one compute capability. *Packed* is zlib at level 6, as zip files, wheels and
image layers hold it: code packs to a fraction, random weights hardly. No GPU is needed, nothing is run.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save_cifar10, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.target_options import DEFAULTS, TargetOptions

STEPS, CAPABILITY = 5, "8.9"
FORMS = ("unrolled", "loop")
PRECISIONS = ("fp32", "fp16", "int8", "fp8")


def packed(path: Path) -> int:
    """Bytes that are left of a file."""
    squeeze, found = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            found += len(squeeze.compress(chunk))
    return found + len(squeeze.flush())


def measure(model: Path, form: str, precision: str, folder: Path) -> dict[str, Any]:
    """One engine, and the graph that it was made of."""
    sizes = {}
    chosen = {"onnx": DEFAULTS, "tensorrt-rtx": TargetOptions(compute_capability=CAPABILITY, cache=folder / "cache")}
    for target, of_target in chosen.items():
        options = BuildOptions(
            str(model), target, folder / target, precision,
            steps=STEPS, sampler="ddim", form=form, of_target=of_target, verify=False,
        )  # fmt: skip
        bundle = build(options, lambda text: print(f"  {text}", flush=True))
        sizes[target] = {"bytes": bundle.artefact_bytes, "packed_bytes": packed(bundle.artefact_path)}
    return {"form": form, "precision": precision, **sizes}


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
