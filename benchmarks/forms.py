"""Unrolled graph against Loop over the step count -> benchmarks/results/forms.json: build, file, load, speed.

A 16x16 UNet2DModel of 1.6 M random weights. Building and loading are CPU seconds of the least of three tries, which a
busy machine disturbs least; a run is timed interleaved, both forms of one step count in one measurement. The growth is
the slope of a straight line through log(seconds) over log(steps) from 5 steps on: 1 is linear. About 5 minutes.

``--large``: the ddpm-cifar10 architecture instead, without runs, one try each -> benchmarks/results/forms_large.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, save_cifar10, save_small, write_result
from mmd_export.checkpoint import load_checkpoint
from mmd_export.latency import REST, measure
from mmd_export.program import SamplerProgram, export_program
from mmd_export.targets import CompileOptions, get_target

STEPS = (1, 5, 10, 20, 50)
LARGE_STEPS = (5, 20, 50)
FORMS = ("unrolled", "loop")
TRIES = 3


def cpu_seconds(call: Callable[[], object], tries: int = TRIES) -> float:
    """The least of several tries."""
    found = []
    for _ in range(tries):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return round(min(found), 3)


def compile_form(program: SamplerProgram, form: str, folder: Path, tries: int = TRIES) -> dict[str, Any]:
    """The artefact in ``folder``, and what it cost."""
    target, options, nodes = get_target("onnx"), CompileOptions(form=form), 0

    def compile_once() -> None:
        nonlocal nodes
        nodes = target.compile(program, folder, options).graph["nodes"]

    seconds = cpu_seconds(compile_once, tries)
    return {"nodes": nodes, "bytes": (folder / target.artefact).stat().st_size, "compile_cpu_seconds": seconds}


def session(path: Path) -> Any:
    """onnxruntime as the runtime sets it up."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def measure_steps(model: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Both forms of one step count."""
    checkpoint = load_checkpoint(str(model))
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(steps), checkpoint.shape, 1)
    noise = np.random.default_rng(0).standard_normal((1, *checkpoint.shape)).astype(np.float32)
    row: dict[str, Any] = {"steps": steps}
    runs: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for form in FORMS:
            folder = Path(scratch) / form
            folder.mkdir()
            row[form] = compile_form(program, form, folder)
            path = folder / get_target("onnx").artefact
            row[form]["load_cpu_seconds"] = cpu_seconds(lambda path=path: session(path))  # type: ignore[misc]
            opened = session(path)
            runs[form] = lambda opened=opened: opened.run(None, {"noise": noise})  # type: ignore[misc]
        report = measure(runs, rounds, warmup=5, rest=REST)
    row["loop_takes"] = vars(report.ratio("loop", "unrolled"))
    print(row, flush=True)
    return row


def measure_large(model: Path, steps: int) -> dict[str, Any]:
    """Both forms of one step count, built and loaded once; nothing is run."""
    checkpoint = load_checkpoint(str(model))
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(steps, sampler="ddim"), checkpoint.shape, 1)
    row: dict[str, Any] = {"steps": steps}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            row[form] = compile_form(program, form, Path(folder), tries=1)
            path = Path(folder) / get_target("onnx").artefact
            row[form]["load_cpu_seconds"] = cpu_seconds(lambda path=path: session(path), tries=1)  # type: ignore[misc]
    print(row, flush=True)
    return row


def slope(rows: list[dict[str, Any]], form: str, key: str) -> float:
    """Exponent of the growth with the step count, from 5 steps on."""
    grown = [(row["steps"], row[form][key]) for row in rows if row["steps"] >= 5]
    steps, values = (np.log([pair[i] for pair in grown]) for i in (0, 1))
    return round(float(np.polyfit(steps, values, 1)[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / ("forms_large.json" if arguments.large else "forms.json")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.large:
            model = save_cifar10(Path(scratch) / "large")
            rows = [measure_large(model, steps) for steps in LARGE_STEPS]
        else:
            model = save_small(Path(scratch) / "small")
            rows = [measure_steps(model, steps, arguments.rounds) for steps in STEPS]
    keys = ("bytes", "compile_cpu_seconds", "load_cpu_seconds")
    growth = {form: {key: slope(rows, form, key) for key in keys} for form in FORMS}
    write_result(out, "benchmarks/forms.py", {"rows": rows, "growth_exponent": growth})
    print(growth)


if __name__ == "__main__":
    main()
