"""How executorch, torch and coreai grow with the number of steps, on digits -> benchmarks/results/torch_targets.json.

Each target at each number of steps is built in a process of its own: CPU seconds with those of its compilers, peak
memory, bytes, error against the float64 reference, and the median of single-threaded runs. benchmarks/targets.py has
the other models. ``--model`` takes the ddpm-cifar10 architecture too, ``--steps 5`` then; it takes minutes a target.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.targets import MODELS, costs, facts, saved
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.parity import chunks
from mmd_export.runtime import RunOptions
from mmd_runtime.registry import runtime_for

TARGETS = ("onnx", "executorch", "torch", "coreai")
STEPS = (2, 5, 10)
RUNS = 100


def measure(model: str, target: str, steps: int) -> dict[str, Any]:
    """One build and its runs."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        bundle = build(BuildOptions(source, target, Path(scratch) / "bundle", steps=steps, sampler="ddim"), print)
        spent = costs()
        return spent | facts(bundle) | {"op_counts": bundle.manifest.graph.op_counts, **latency(bundle)}


def latency(bundle: Bundle) -> dict[str, Any]:
    """Median and fastest seconds of one image on one thread, after as many runs to warm up as a tenth."""
    session = runtime_for(bundle.manifest.format).open(bundle, RunOptions(threads=1))
    inputs, _ = next(chunks(bundle))
    seconds = []
    for run in range(RUNS // 10 + RUNS):
        start = time.perf_counter()
        session.run(inputs)
        if run >= RUNS // 10:
            seconds.append(time.perf_counter() - start)
    return {"median_seconds": median(seconds), "fastest_seconds": min(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=TARGETS)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--cell", type=Path, help="measure the first target and number of steps here, write them there")
    parser.add_argument("--out", type=Path, default=RESULTS / "torch_targets.json")
    arguments = parser.parse_args()
    if arguments.cell:
        found = measure(arguments.model, arguments.target[0], arguments.steps[0])
        arguments.cell.write_text(json.dumps(found), encoding="utf-8")
        return
    cells: dict[str, Any] = json.loads(arguments.out.read_text())["cells"] if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part.json"
        for target in arguments.target:
            for steps in arguments.steps:
                command = [sys.executable, "-m", "benchmarks.torch_targets", "--model", arguments.model]
                command += ["--target", target, "--steps", str(steps), "--cell", str(part)]
                subprocess.run(command, cwd=ROOT, check=True)
                cells[f"{arguments.model} | {target} | {steps}"] = json.loads(part.read_text(encoding="utf-8"))
                write_result(arguments.out, "benchmarks/torch_targets.py", {"runs": RUNS, "cells": cells})


if __name__ == "__main__":
    main()
