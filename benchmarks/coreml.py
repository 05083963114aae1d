"""Core ML packages: conversion, size, error by reference evaluation, repairs of half precision -> results/coreml.json.

One package a process (``--model``, ``--precision``), so that peak memory is that package's own. The networks but digits
are random and predict v: a random epsilon network saturates nearly every pixel and hides errors.
"""

from __future__ import annotations

import argparse
import json
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
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import RESULTS, ROOT, environment, save_cifar10, save_small, write_result
from mmd_export.build import MIN_GOLDEN
from mmd_export.checkpoint import load_checkpoint
from mmd_export.coreml import capture, convert, probe
from mmd_export.program import export_program
from mmd_export.reference import golden_arrays
from mmd_export.targets import CompileOptions, get_target
from mmd_runtime.mil.evaluate import Evaluator
from mmd_runtime.mil.program import read_package

STEPS = 5
CIFAR10 = "ddpm-cifar10 architecture"
PACKAGES = [("digits", name) for name in ("fp32", "fp16", "w8", "w6", "w4")]
PACKAGES += [(CIFAR10, name) for name in ("fp32", "fp16", "w8")]
WILD = 4000.0  # times the first convolution: activations of some thousands


def saved(model: str, folder: Path) -> str:
    """MODEL of one of ``PACKAGES``."""
    return "digits" if model == "digits" else str(save_cifar10(folder / "ddpm-cifar10", "v_prediction"))


def measure(source: str, precision: str, steps: int, out: Path) -> dict[str, Any]:
    """Checkpoint on disk -> package: what the conversion itself costs; then its errors by reference evaluation."""
    convert.coremltools()  # its import is counted apart
    imports, start = time.process_time(), time.process_time()
    checkpoint = load_checkpoint(source)
    plan = checkpoint.plan_for(steps, sampler="ddim")
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1)
    compiled = get_target("coreml").compile(program, out, CompileOptions(precision))
    seconds = time.process_time() - start
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    size = sum(path.stat().st_size for path in (out / "model.mlpackage").rglob("*") if path.is_file())
    cost = {"cpu_seconds": round(seconds, 1), "with_imports": round(seconds + imports, 1), "peak_memory_mb": peak}
    facts = {"bytes": size, "ops": compiled.graph["nodes"], "op_counts": compiled.graph["op_counts"]}
    return cost | facts | errors(out / "model.mlpackage", golden_arrays(checkpoint, plan, MIN_GOLDEN))


def errors(package: Path, golden: dict[str, Any]) -> dict[str, Any]:
    """Largest absolute error of each state and of the sample over the golden noises, and the seconds of one run."""
    evaluator = Evaluator(read_package(package))
    names = {name: name.replace(".", "_") for name in golden if name != "noise"}
    found = dict.fromkeys(names, 0.0)
    start = time.perf_counter()
    for row in range(len(golden["noise"])):
        values = evaluator.run({"noise": golden["noise"][row : row + 1]}, names.values())
        for name, value in names.items():
            found[name] = max(found[name], float(np.abs(values[value] - golden[name][row : row + 1]).max()))
    seconds = (time.perf_counter() - start) / len(golden["noise"])
    return {"worst": max(found.values()), "errors": found, "evaluation_seconds": round(seconds, 2)}


# --- half precision in a network whose activations leave it, and the two ways of writing a GroupNorm


def scaled_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """GroupNorm(x; eps) = GroupNorm(x / s; eps / s^2), s = 2^8: squares fit half precision, nothing is cast."""
    return plain_group_norm(x / 256.0, groups, weight, bias, eps / 256.0**2)


def aten_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    """As torch has it; coremltools writes it out in means, squares and products."""
    return F.group_norm(x, groups, weight, bias, eps)


plain_group_norm = capture.group_norm


@contextmanager
def changed(norm: Callable[..., Tensor], islands: bool) -> Iterator[None]:
    """The target with another GroupNorm, with or without operators that stay float32."""
    kept = capture.group_norm, probe.find_islands, probe.find_ends
    capture.group_norm = norm
    if not islands:
        probe.find_islands, probe.find_ends = (lambda *_: frozenset()), (lambda *_: frozenset())
    try:
        yield
    finally:
        capture.group_norm, probe.find_islands, probe.find_ends = kept


def wild(folder: Path) -> Path:
    """The 16x16 network with activations of some thousands."""
    from safetensors.torch import load_file, save_file

    save_small(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({n: WILD * w if n.startswith("conv_in.") else w for n, w in weights.items()}, path)
    return folder


WAYS: dict[str, tuple[Callable[..., Tensor], bool, tuple[str, ...]]] = {
    "layer_norm, all in half precision": (plain_group_norm, False, ("tame fp32", "tame fp16", "wild fp16")),
    "layer_norm, float32 where the probe says": (plain_group_norm, True, ("wild fp16",)),
    "layer_norm of x / 256": (scaled_group_norm, False, ("tame fp16", "wild fp16")),
    "as torch has it, all in half precision": (aten_group_norm, False, ("tame fp32", "tame fp16", "wild fp16")),
}


def norms() -> list[dict[str, Any]]:
    """The 16x16 network, 2 steps, by the way its GroupNorm is written; wild: its activations reach some thousands."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"tame": save_small(Path(scratch) / "tame"), "wild": wild(Path(scratch) / "wild")}
        for way, (norm, islands, cases) in WAYS.items():
            for case in cases:
                network, precision = case.split()
                out = Path(scratch) / f"{len(rows)}"
                out.mkdir()
                with changed(norm, islands):
                    found = measure(str(models[network]), precision, 2, out)
                casts = found["op_counts"].get("cast", 0)
                kept = {key: found[key] for key in ("ops", "cpu_seconds", "worst")}
                rows.append({"way": way, "network": network, "precision": precision, "casts": casts, **kept})
                print(rows[-1], flush=True)
    return rows


def package(model: str, precision: str, part: Path) -> dict[str, Any]:
    """One package, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.coreml", "--model", model, "--precision", precision]
    subprocess.run([*command, "--out", str(part)], cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    print(model, precision, {key: value for key, value in result.items() if key != "op_counts"}, flush=True)
    return {"model": model, "precision": precision, **result}


def all_measured(scratch: Path) -> dict[str, Any]:
    """Packages and norms."""
    packages = [package(model, precision, scratch / "part.json") for model, precision in PACKAGES]
    environments = {"packages": environment(), "norms": environment()}
    return {"steps": STEPS, "packages": packages, "norms": norms(), "environments": environments}


def norms_measured(old: dict[str, Any]) -> dict[str, Any]:
    """``old`` with other norms; its packages keep the environment that they were measured in."""
    of_packages = old.get("environments", {}).get("packages", old.get("environment"))
    kept = {"steps": old["steps"], "packages": old["packages"]}
    return {**kept, "norms": norms(), "environments": {"packages": of_packages, "norms": environment()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="measure one package and write its JSON")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--norms", action="store_true", help="the ways of writing a norm alone; packages stay as they were"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "coreml.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model:
            source = saved(arguments.model, Path(scratch))
            result = measure(source, arguments.precision, STEPS, Path(scratch))
            arguments.out.write_text(json.dumps(result), encoding="utf-8")
            return
        if arguments.norms:
            values = norms_measured(json.loads(arguments.out.read_text(encoding="utf-8")))
        else:
            values = all_measured(Path(scratch))
    write_result(arguments.out, "benchmarks/coreml.py", values)


if __name__ == "__main__":
    main()
