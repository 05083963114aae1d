"""Build, parity, size and latency of the ONNX artefacts -> benchmarks/results/artefacts.json.

One model a process (``--model``), so that peak memory is that model's own; without it, all of them in turn. ``build``
is the whole command with its float64 reference and its verification, ``compile`` the export alone in its own process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, save_cifar10, timed, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.commands.bench import bench
from mmd_export.commands.candidates import BenchOptions
from mmd_export.commands.verify import verify
from mmd_export.program import export_program
from mmd_export.targets import CompileOptions, get_target

MODELS = ("digits", "ddpm-cifar10 architecture")
STEPS = 5


def compile_alone(model: str) -> dict[str, Any]:
    """Checkpoint on disk -> checked ONNX file, and nothing else in the process: what the export itself costs."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        start = time.process_time()
        checkpoint = load_checkpoint(source)
        program = export_program(checkpoint.denoiser, checkpoint.plan_for(STEPS, sampler="ddim"), checkpoint.shape, 1)
        get_target("onnx").compile(program, Path(scratch), CompileOptions())
        seconds = time.process_time() - start
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"cpu_seconds": round(seconds, 2), "with_imports": round(time.process_time(), 2), "peak_memory_mb": peak}


def saved(model: str, folder: Path) -> str:
    """MODEL of one of ``MODELS``."""
    return "digits" if model == "digits" else str(save_cifar10(folder / "ddpm-cifar10"))


def measure(model: str, seconds: float) -> dict[str, Any]:
    """Everything of one model but ``compile_alone``."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        out = Path(scratch) / "bundle"
        result: dict[str, Any] = {}
        with timed(result, "build"):
            bundle = build(BuildOptions(source, "onnx", out, steps=STEPS, sampler="ddim"), print)
        result |= sizes(bundle) | parity(bundle, source)
        return result | latency(out, source, seconds) if seconds > 0 else result


def sizes(bundle: Bundle) -> dict[str, Any]:
    """Bytes of the artefact, its weights counted once, its nodes; and the limit that the project sets itself."""
    graph, size = bundle.manifest.graph, bundle.artefact_bytes
    limit = 1.05 * graph.unique_weight_bytes + 2048 * graph.nodes
    return {"size": {"bytes": size, "limit": int(limit), "within": size <= limit, **graph.model_dump(mode="json")}}


def parity(bundle: Bundle, source: str) -> dict[str, Any]:
    """Rungs 1 to 6."""
    report = verify(bundle, checkpoint=source, notify=print)
    report.require()
    return {"parity": report.to_dict(), "worst_artefact_error": report.rungs[-1].worst}


def latency(bundle: Path, source: str, seconds: float) -> dict[str, Any]:
    """Batch 1 against torch eager and against one step called K times, interleaved."""
    report = bench(BenchOptions((bundle,), checkpoint=source, seconds=seconds), print)
    first = report.candidates[0]
    ratios = {name: vars(report.latency.ratio(name, first)) for name in report.baselines}
    medians = {name: report.latency.summary(name).median for name in report.latency.seconds}
    return {"latency": {"rounds": report.latency.rounds, "ratios": ratios, "median_seconds": medians}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="measure one model and print its JSON")
    parser.add_argument("--compile", action="store_true", help="of that model, only what the export costs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of interleaved latency runs a model; 0 for none")
    parser.add_argument("--out", type=Path, default=RESULTS / "artefacts.json")
    arguments = parser.parse_args()
    if arguments.model:
        result = compile_alone(arguments.model) if arguments.compile else measure(arguments.model, arguments.seconds)
        arguments.out.write_text(json.dumps(result), encoding="utf-8")
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            part = Path(scratch) / "part.json"
            command = [sys.executable, "-m", "benchmarks.artefacts", "--model", model, "--out", str(part)]
            subprocess.run([*command, "--seconds", str(arguments.seconds)], cwd=ROOT, check=True)
            results[model] = json.loads(part.read_text(encoding="utf-8"))
            subprocess.run([*command, "--compile"], cwd=ROOT, check=True)
            results[model]["compile"] = json.loads(part.read_text(encoding="utf-8"))
    write_result(arguments.out, "benchmarks/artefacts.py", {"steps": STEPS, "models": results})


if __name__ == "__main__":
    main()
