"""Core ML packages: conversion, size, error by reference evaluation, repairs of half precision -> results/coreml.json.

One package a process (``--model``, ``--precision``), so that peak memory is that package's own. The networks but digits
are random and predict v: a random epsilon network saturates nearly every pixel and hides errors.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import RESULTS, ROOT, save_cifar10, save_small, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.coreml import capture, convert, probe
from mmd_export.errors import ParityError
from mmd_export.program import export_program
from mmd_export.runtime import RunOptions
from mmd_export.targets import CompileOptions, get_target
from mmd_runtime.coreml_reference import RUNTIME

STEPS = 5
CIFAR10 = "ddpm-cifar10 architecture"
PACKAGES = [("digits", name) for name in ("fp32", "fp16", "w8", "w6", "w4")]
PACKAGES += [(CIFAR10, name) for name in ("fp32", "fp16", "w8")]
WILD = 4000.0  # times the first convolution: activations of some thousands


def saved(model: str, folder: Path) -> str:
    """MODEL of one of ``PACKAGES``."""
    return "digits" if model == "digits" else str(save_cifar10(folder / "ddpm-cifar10", "v_prediction"))


def compile_alone(model: str, precision: str, out: Path) -> dict[str, Any]:
    """Checkpoint on disk -> package, nothing else in the process: what the conversion itself costs."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        convert.coremltools()  # its import is counted apart
        imports, start = time.process_time(), time.process_time()
        checkpoint = load_checkpoint(source)
        program = export_program(checkpoint.denoiser, checkpoint.plan_for(STEPS, sampler="ddim"), checkpoint.shape, 1)
        compiled = get_target("coreml").compile(program, out, CompileOptions(precision))
        seconds = time.process_time() - start
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "cpu_seconds": round(seconds, 1), "with_imports": round(seconds + imports, 1), "peak_memory_mb": peak,
        "bytes": size, "ops": compiled.graph["nodes"], "op_counts": compiled.graph["op_counts"],
    }  # fmt: skip


def verified(model: str, precision: str) -> dict[str, Any]:
    """Error at each state and the sample by reference evaluation, and the seconds of one evaluation of the chain."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        options = BuildOptions(
            source, "coreml", Path(scratch) / "bundle", precision, steps=STEPS, sampler="ddim", verify=False
        )
        bundle = build(options)
        return errors(bundle)


def errors(bundle: Bundle) -> dict[str, Any]:
    """Largest absolute error of each state, free-running, and of the sample, over the golden noises."""
    golden, chain = bundle.golden(), RUNTIME.open_chain(bundle, RunOptions())
    start = time.perf_counter()
    parts = [chain.run_chain({"noise": golden.noise[row : row + 1]}) for row in range(golden.count)]
    seconds = (time.perf_counter() - start) / golden.count
    expected = {f"state.{k}": state for k, state in enumerate(golden.states, start=1)} | {"sample": golden.sample}
    found = {
        name: float(np.abs(np.concatenate([part[name] for part in parts]) - value).max())
        for name, value in expected.items()
    }
    return {"worst": max(found.values()), "errors": found, "evaluation_seconds": round(seconds, 2)}


# --- half precision in a network whose activations leave it, and the two ways of writing a GroupNorm


def scaled_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """GroupNorm(x; eps) = GroupNorm(x / s; eps / s^2), with s = 2^8: squares fit half precision, and nothing is cast."""
    return plain_group_norm(x / 256.0, groups, weight, bias, eps / 256.0**2)


def aten_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """As torch has it; coremltools writes it out in means, squares and products."""
    return F.group_norm(x, groups, weight, bias, eps)


plain_group_norm = capture.group_norm


@contextmanager
def changed(norm: Callable[..., Tensor], islands: bool) -> Iterator[None]:
    """The target with another GroupNorm, with or without the probe."""
    kept = capture.group_norm, probe.find_islands
    capture.group_norm = norm
    if not islands:
        probe.find_islands = lambda *_: frozenset()
    try:
        yield
    finally:
        capture.group_norm, probe.find_islands = kept


def wild(folder: Path) -> Path:
    """The 16x16 network with activations of some thousands."""
    from safetensors.torch import load_file, save_file

    save_small(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({n: WILD * w if n.startswith("conv_in.") else w for n, w in weights.items()}, path)
    return folder


def norms() -> list[dict[str, Any]]:
    """The 16x16 network by the way its GroupNorm is written, tame in float32 and wild in half precision."""
    ways: dict[str, tuple[Callable[..., Tensor], bool]] = {
        "layer_norm": (plain_group_norm, False),
        "layer_norm, float32 where the probe says": (plain_group_norm, True),
        "layer_norm of x / 256": (scaled_group_norm, False),
        "as torch has it": (aten_group_norm, False),
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"tame": save_small(Path(scratch) / "tame"), "wild": wild(Path(scratch) / "wild")}
        for way, (norm, islands) in ways.items():
            for name, precision in (("tame", "fp32"), ("tame", "fp16"), ("wild", "fp16")):
                out = Path(scratch) / f"{len(rows)}"
                with changed(norm, islands):
                    start = time.process_time()
                    options = BuildOptions(
                        str(models[name]), "coreml", out, precision, steps=STEPS, sampler="ddim", verify=False
                    )
                    bundle = build(options)
                    seconds = time.process_time() - start
                worst = errors(bundle)["worst"]
                graph = bundle.manifest.graph
                rows.append(
                    {"way": way, "network": name, "precision": precision, "ops": graph.nodes,
                     "casts": graph.op_counts.get("cast", 0), "build_cpu_seconds": round(seconds, 1),
                     "worst": worst if math.isfinite(worst) else None}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def package(model: str, precision: str, part: Path) -> dict[str, Any]:
    """Both measurements of one package, each in a process of its own."""
    result: dict[str, Any] = {}
    for what in ("compile", "verify"):
        command = [sys.executable, "-m", "benchmarks.coreml", "--model", model, "--precision", precision]
        subprocess.run([*command, "--what", what, "--out", str(part)], cwd=ROOT, check=True)
        result |= json.loads(part.read_text(encoding="utf-8"))
    print(model, precision, {key: value for key, value in result.items() if key != "op_counts"}, flush=True)
    return {"model": model, "precision": precision, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="measure one package and write its JSON")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--what", choices=("compile", "verify"), default="compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "coreml.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model:
            what = {"compile": lambda: compile_alone(arguments.model, arguments.precision, Path(scratch)),
                    "verify": lambda: verified(arguments.model, arguments.precision)}  # fmt: skip
            arguments.out.write_text(json.dumps(what[arguments.what]()), encoding="utf-8")
            return
        rows = [package(model, precision, Path(scratch) / "part.json") for model, precision in PACKAGES]
    torch.manual_seed(0)
    versions = {name: __import__(name).__version__ for name in ("torch", "coremltools")}
    write_result(
        arguments.out,
        "benchmarks/coreml.py",
        {"steps": STEPS, "versions": versions, "packages": rows, "norms": norms()},
    )


if __name__ == "__main__":
    main()
