"""OpenVINO against torch eager and onnxruntime, batch 1, 5 steps, CPU -> benchmarks/results/openvino.json.

Built-in digits and the ddpm-cifar10 architecture (random weights), one interleaved run each with the same threads.
Sizes, CPU seconds of building (export included) and of loading, and the worst error of rung 6 stand beside. About 4
minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, save_cifar10, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.latency import REST, measure
from mmd_export.parity import check_artefact
from mmd_export.reference import sampler_of
from mmd_export.runtime import Arrays, RunOptions
from mmd_export.target_options import TargetOptions
from mmd_runtime.registry import get_runtime

STEPS = 5
# target, precision, --device
CANDIDATES: dict[str, tuple[str, str, str | None]] = {
    "openvino": ("openvino", "fp32", None),
    "openvino --device cpu": ("openvino", "fp32", "cpu"),
    "openvino w16": ("openvino", "w16", None),
    "onnxruntime": ("onnx", "fp32", None),
    "onnxruntime --device cpu": ("onnx", "fp32", "cpu"),
}
RUNTIMES = {"openvino": "openvino", "onnx": "onnxruntime"}
EAGER = "torch eager"
Call = Callable[[], object]


def built(model: str, out: Path, target: str, precision: str, device: str | None) -> tuple[Bundle, float]:
    """The bundle, unverified, and the CPU seconds that it took."""
    start = time.process_time()
    of_target = TargetOptions(device=device)
    options = BuildOptions(
        model, target, out, precision, steps=STEPS, sampler="ddim", verify=False, of_target=of_target
    )
    return build(options), round(time.process_time() - start, 1)


def candidate(model: str, name: str, out: Path, inputs: Arrays) -> tuple[dict[str, Any], Call]:
    target, precision, device = CANDIDATES[name]
    bundle, seconds = built(model, out, target, precision, device)
    runtime, options = get_runtime(RUNTIMES[target]), RunOptions(threads=torch.get_num_threads())
    start = time.process_time()
    session = runtime.open(bundle, options)
    loaded = round(time.process_time() - start, 2)
    facts = {
        "bytes": bundle.artefact_bytes,
        "weight_bytes": bundle.manifest.graph.unique_weight_bytes,
        "nodes": bundle.manifest.graph.nodes,
        "build_cpu_seconds": seconds,
        "load_cpu_seconds": loaded,
        "worst_error": check_artefact(bundle, runtime, options).worst,
    }
    print(name, facts, flush=True)
    return facts, lambda: session.run(inputs)


def eager(checkpoint: Checkpoint, noise: torch.Tensor) -> Call:
    sampler = sampler_of(checkpoint, checkpoint.plan_for(STEPS, sampler="ddim"))

    def call() -> object:
        with torch.inference_mode():
            return sampler(noise).numpy()

    return call


def measure_model(model: str, rounds: int, scratch: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(model)
    noise = torch.randn(1, *checkpoint.shape, generator=torch.Generator().manual_seed(0))
    inputs = {"noise": noise.numpy()}
    made = {name: candidate(model, name, scratch / name.replace(" ", "-"), inputs) for name in CANDIDATES}
    calls = {EAGER: eager(checkpoint, noise)} | {name: call for name, (_, call) in made.items()}
    report = measure(calls, rounds, warmup=10, rest=REST)
    faster = {name: report.ratio(EAGER, name) for name in CANDIDATES}
    print(model, {name: round(ratio.median, 3) for name, ratio in faster.items()}, flush=True)
    return {
        "rounds": rounds,
        "median_seconds": {name: report.summary(name).median for name in calls},
        "times_faster_than_eager": {name: vars(ratio) for name, ratio in faster.items()},
        "openvino_takes_of_onnxruntime": vars(report.ratio("openvino", "onnxruntime")),
        "artefacts": {name: facts for name, (facts, _) in made.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--model", choices=("digits", "cifar10", "all"), default="all")
    parser.add_argument("--out", type=Path, default=RESULTS / "openvino.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.model in ("digits", "all"):
            results["digits"] = measure_model("digits", arguments.rounds, folder / "digits-bundles")
        if arguments.model in ("cifar10", "all"):
            model = str(save_cifar10(folder / "cifar10", "v_prediction"))
            results["ddpm-cifar10 architecture"] = measure_model(model, arguments.rounds, folder / "cifar10-bundles")
    write_result(arguments.out, "benchmarks/openvino.py", {"steps": STEPS, "models": results})


if __name__ == "__main__":
    main()
