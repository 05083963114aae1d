"""Which operators of a network in 16 bits are worth float32: errors of many samples -> results/half_ends.json.

The ONNX graph is run twice: by onnxruntime, which joins nodes without rounding between them, and with every result
rounded, the most that a device may do; in bfloat16, for which onnxruntime's CPU has no kernels, in the second way only.
Core ML is reference evaluation. Errors are those of the sample against the float32 graph. The weights of the
ddpm-cifar10 architecture are random and predict v.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.common import RESULTS, save_cifar10, write_result
from benchmarks.precision import session_of
from benchmarks.precision_tables import AIM
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.coreml import probe
from mmd_export.coreml.capture import Captured
from mmd_export.noise import sampler_noise
from mmd_export.onnx_calls import exact_calls, graph_spec, unrolled
from mmd_export.plan import StepPlan
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import BF16, FP16, Half
from mmd_export.precision.half import to_half
from mmd_export.precision.islands import ends, islands
from mmd_export.precision.lower import SCANNED, typed
from mmd_export.precision.scan import scan
from mmd_export.program import export_program
from mmd_export.targets import CompileOptions, get_target
from mmd_runtime.mil.evaluate import Evaluator
from mmd_runtime.mil.program import read_package

STEPS, SEED = 5, 5
CIFAR10 = "ddpm-cifar10 architecture"
IMAGES = {"digits": 512, CIFAR10: 16}
COREML_IMAGES = 64
AT_ONCE = {"digits": 64, CIFAR10: 4}
Keeps = Callable[[ir.Model], Mapping[ir.Node, str]]
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _convolutions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Conv"]


def _chosen(choose: Callable[[ir.Model], list[ir.Node]]) -> Keeps:
    return lambda model: dict.fromkeys(choose(model), "trial")


def _all_but_inner(model: ir.Model) -> list[ir.Node]:
    inner = set(_convolutions(model)[1:-1])
    return [node for node in model.graph if node.op_type != "Shape" and node not in inner]


# The last is too many casts to ship; it shows what is left.
TRIALS: dict[str, Keeps] = {
    "no operator for its place": lambda _: {},
    "the first convolution": _chosen(lambda model: _convolutions(model)[:1]),
    "the last convolution": _chosen(lambda model: _convolutions(model)[-1:]),
    "the first and the last": _chosen(lambda model: [_convolutions(model)[0], _convolutions(model)[-1]]),
    "every sum of a residual": _chosen(
        lambda model: [
            node for node in model.graph if node.op_type == "Add" and str(node.outputs[0].name).startswith("add")
        ]
    ),
    "both ends, as shipped": ends,
    "all but the inner convolutions": _chosen(_all_but_inner),
}
# What stands in for the target's own finder of ends.
COREML_TRIALS: dict[str, Callable[[Captured], frozenset[str]]] = {
    "no operator for its place": lambda _: frozenset(),
    "both ends, as shipped": probe.find_ends,
}


def spread(found: NDArray[np.float32], exact: NDArray[np.float32]) -> dict[str, Any]:
    """The error of images: of the worst, of the hundredth worst, of the middle one, and how many miss the aim."""
    errors = np.abs(found.astype(np.float64) - exact).reshape(len(exact), -1)
    worst = errors.max(axis=1)
    return {
        "worst": float(worst.max()),
        "p99": float(np.quantile(worst, 0.99)),
        "median": float(np.median(worst)),
        "rms": float(np.sqrt(np.mean(errors**2))),
        "beyond_aim": int((worst > AIM).sum()),
    }


def noises(checkpoint: Checkpoint, plan: StepPlan, count: int, rows: int) -> Iterator[NDArray[np.float32]]:
    """``count`` images' noise, ``rows`` at a time."""
    for first in range(0, count, rows):
        yield sampler_noise(SEED, rows, checkpoint.shape, plan.noisy_steps, first=first)["noise"]


def onnx_rows(name: str, source: str, trials: Mapping[str, Keeps], half: Half = FP16) -> Iterator[dict[str, Any]]:
    """Each trial, run in every way that there is."""
    checkpoint = load_checkpoint(source)
    plan = checkpoint.plan_for(STEPS, sampler="ddim")
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, None, checkpoint.conditions)
    calls, spec = exact_calls(program), graph_spec(program, "float32")
    given = list(noises(checkpoint, plan, IMAGES[name], AT_ONCE[name]))

    def sampled(model: ir.Model) -> NDArray[np.float32]:
        session = session_of(model)
        return np.concatenate([session.run(["sample"], {"noise": part})[0] for part in given])

    exact = sampled(unrolled(calls, spec))
    seen = scan(replace(calls, model=typed(calls.model)), SCANNED)
    for trial, keeps in trials.items():
        lowered = replace(calls, model=typed(calls.model))
        kept = {**keeps(lowered.model), **islands(lowered.model, seen, half)}
        whole = unrolled(to_half(lowered, kept, half), spec)
        facts = {
            "casts": sum(node.op_type == "Cast" for node in whole.graph),
            "kept_in_a_call": len(kept),
            "bytes": len(ir.to_proto(whole).SerializeToString()),
        }
        ways = {"onnxruntime": whole} if half is FP16 else {}
        for how, model in (ways | {"every result rounded": emulated(whole, half)}).items():
            yield {
                "model": name,
                "target": "onnx",
                "precision": half.name,
                "run": how,
                "trial": trial,
                **facts,
                **spread(sampled(model), exact),
            }


def coreml_rows() -> Iterator[dict[str, Any]]:
    """Packages of digits without and with the ends in float32."""
    checkpoint = load_checkpoint("digits")
    plan = checkpoint.plan_for(STEPS, sampler="ddim")
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1)
    given = list(noises(checkpoint, plan, COREML_IMAGES, 1))
    dynamic = export_program(checkpoint.denoiser, plan, checkpoint.shape, None)
    session = session_of(unrolled(exact_calls(dynamic), graph_spec(dynamic, "float32")))
    exact = session.run(["sample"], {"noise": np.concatenate(given)})[0]
    for trial, find in COREML_TRIALS.items():
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(probe, "find_ends", find):
            compiled = get_target("coreml").compile(program, Path(folder), CompileOptions("fp16"))
            package = Path(folder) / "model.mlpackage"
            evaluator = Evaluator(read_package(package))
            samples = np.concatenate([evaluator.run({"noise": part}, ["sample"])["sample"] for part in given])
            size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
        facts = {"casts": compiled.graph["op_counts"].get("cast", 0), "bytes": size}
        how = {"target": "coreml", "precision": "fp16", "run": "reference evaluation"}
        yield {"model": "digits", **how, "trial": trial, **facts, **spread(samples, exact)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "half_ends.json")
    arguments = parser.parse_args()
    rows, start = [], time.process_time()
    shipped = {name: TRIALS[name] for name in ("no operator for its place", "both ends, as shipped")}
    with tempfile.TemporaryDirectory() as folder:
        cifar10 = str(save_cifar10(Path(folder) / "ddpm-cifar10", "v_prediction"))
        for found in (
            onnx_rows("digits", "digits", TRIALS),
            coreml_rows(),
            onnx_rows(CIFAR10, cifar10, shipped),
            onnx_rows("digits", "digits", shipped, BF16),
            onnx_rows(CIFAR10, cifar10, shipped, BF16),
        ):
            for row in found:
                rows.append({"images": COREML_IMAGES if row["target"] == "coreml" else IMAGES[row["model"]], **row})
                print(rows[-1], flush=True)
    seconds = round(time.process_time() - start)
    write_result(arguments.out, "benchmarks/half_ends.py", {"steps": STEPS, "cpu_seconds": seconds, "rows": rows})


if __name__ == "__main__":
    main()
