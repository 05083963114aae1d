"""Planted faults and honest bundles through the parity ladder -> benchmarks/results/fault_injection.json.

Every fault must be caught and blamed on the rung of its stage; no honest verification may fail. Tolerances are set from
the tails of other honest verifications (``--tails`` -> benchmarks/results/honest_tails.json), so that none is judged by
a tolerance that was made for it. What was run before is not run again; ``--again`` starts afresh. Core ML is reference
evaluation, bf16 is left out (onnxruntime's CPU provider has no kernels for it).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks import faults
from benchmarks.common import RESULTS, write_result
from benchmarks.faults import STEPS, Lab
from mmd_export.build import BuildOptions, build, golden_count
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.commands.verify import verify
from mmd_export.noise import sampler_noise
from mmd_export.parity import ParityReport
from mmd_export.plan import StepPlan
from mmd_export.reference import golden_arrays
from mmd_export.tolerance import mean_tolerance

TARGETS = ("onnx", "openvino", "coreml")
HONEST_STEPS = 5
PARTS = ("faults", "honest")
SEEDS_OF_TAILS, SEEDS_OF_VERIFICATIONS = 0, 1_000_000  # where the seeds of golden files begin
LONG_TAILED = ("int8", "fp8", "w4")  # of few images the error is far below that of the worst
HONEST = (
    *(("onnx", precision, batch, output, 26 if precision in LONG_TAILED else 13)
      for precision in ("fp32", "fp16", "int8", "fp8", "w8", "w4")
      for batch, output in (("1", "float32"), ("1,4", "float32"), ("1..3", "uint8"))),
    *(("openvino", precision, batch, output, 10)
      for precision in ("fp32", "w16") for batch, output in (("1", "float32"), ("2", "uint8"))),
    *(("coreml", precision, "1", "float32", 6) for precision in ("fp32", "fp16", "w8", "w6", "w4")),
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """``rungs``: those of its stage; ``step``: the step that must be named, None for any."""

    kind: str
    target: str
    seed: int
    rungs: tuple[int, ...]
    run: Callable[[Lab], ParityReport]
    step: int | None = None

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.target}: {self.kind}, seed {self.seed}"


def all_faults() -> list[Fault]:
    """Every fault."""
    return [*(fault for target in TARGETS for fault in artefact_faults(target)), *upstream_faults()]


def artefact_faults(target: str) -> Iterator[Fault]:
    """What can go wrong between the program and the runtime."""

    def fault(kind: str, seed: int, run: Callable[[Lab], ParityReport], step: int | None = None) -> Fault:
        return Fault(kind, target, seed, (6,), run, step)

    def bytes_of(change: Callable[[Any], None], seed: int) -> Callable[[Lab], ParityReport]:
        return lambda lab: lab.judge(faults.patched(lab, lab.honest(target), np.random.default_rng(seed), change))

    for seed in range(3):
        yield fault("weight sign flipped", seed, bytes_of(faults.flip(31), seed))
    for seed in range(3, 5):
        yield fault("weight exponent bit flipped", seed, bytes_of(faults.flip(23 + 4 * (seed - 3)), seed))
    yield fault("weight NaN", 5, bytes_of(faults.to_nan, 5))
    yield fault(
        "swapped operator, GELU for SiLU", 0, _network(target, lambda n: faults.with_activation(n, 1, nn.GELU()))
    )
    for seed in (0, 2):
        dropped = partial(faults.with_activation, place=seed, activation=nn.Identity())
        yield fault("dropped operator, no SiLU", seed, _network(target, dropped))
    yield fault("transposed channels", 0, _network(target, lambda n: faults.FlippedChannels(n).eval()))
    yield fault("stale engine, weights of another step", 0, _network(target, lambda n: faults.perturbed(n, 0)))
    yield fault("constant image", 0, _network(target, lambda n: faults.Saturated(n).eval()))
    for k in range(STEPS):
        yield fault("wrong coefficient in the graph", k, _plan(target, _coefficient(k)), k + 1)
    for k in (0, 1):
        yield fault("off-by-one timestep in the graph", k, _plan(target, _late(k)), k + 1)
    yield fault("wrong eta in the graph", 0, _plan(target, lambda lab: lab.checkpoint.plan_for(STEPS, eta=0.6)))
    yield fault("wrong clip in the graph", 0, _plan(target, lambda lab: replace(lab.plan, clip=0.8)))
    yield fault("half precision overflow", 0, lambda lab: faults.overflowing(lab, target))
    if target != "coreml":  # there Core ML itself rounds
        yield fault("bytes truncated, not rounded", 0, _truncated(target))


def _network(target: str, change: Callable[[nn.Module], nn.Module]) -> Callable[[Lab], ParityReport]:
    def run(lab: Lab) -> ParityReport:
        writer = lab.compiled(target, denoiser=change(lab.checkpoint.denoiser))
        return lab.judge(lab.sealed(lab.honest(target), writer))

    return run


def _plan(target: str, change: Callable[[Lab], StepPlan]) -> Callable[[Lab], ParityReport]:
    return lambda lab: lab.judge(lab.sealed(lab.honest(target), lab.compiled(target, plan=change(lab))))


def _coefficient(k: int) -> Callable[[Lab], StepPlan]:
    return lambda lab: faults.wrong_coefficient(lab.plan, k, np.random.default_rng(k))


def _late(k: int) -> Callable[[Lab], StepPlan]:
    return lambda lab: faults.changed_step(lab.plan, k, timestep=lab.plan.steps[k].timestep - 1)


def _truncated(target: str) -> Callable[[Lab], ParityReport]:
    def run(lab: Lab) -> ParityReport:
        good = lab.honest(target, "uint8")
        with faults.truncating():
            return lab.judge(lab.sealed(good, lab.compiled(target, output="uint8")), upstream=True)

    return run


def upstream_faults() -> Iterator[Fault]:
    """What can go wrong before a target is reached; the artefact is ONNX."""

    def fault(kind: str, seed: int, rungs: tuple[int, ...], run: Callable[[Lab], ParityReport]) -> Fault:
        return Fault(kind, "onnx", seed, rungs, run)

    for k in range(2):
        yield fault("wrong coefficient in the plan", k, (1, 2), partial(_wrong_plan, change=_coefficient(k)))
        yield fault("off-by-one timestep in the plan", k, (1, 2), partial(_wrong_plan, change=_late(k)))
        yield fault("wrong time table", k, (4,), partial(_wrong_table, k=k))
        yield fault("wrong exported program", k, (5,), partial(_wrong_program, factor=1.0 + 0.001 * (k + 1)))
        yield fault("golden states of other weights", k, (3,), partial(_other_golden, seed=k))
    yield fault("wrong eta in the plan", 0, (1, 2), partial(_wrong_plan, change=_other_eta))
    for seed, name in ((1, "noise"), (2, "step_noise")):
        yield fault(
            f"{name.replace('_', ' ')} of another seed", seed, (3,), partial(_other_noise, seed=seed, name=name)
        )


def _wrong_plan(lab: Lab, change: Callable[[Lab], StepPlan]) -> ParityReport:
    return faults.consistent(lab, change(lab))


def _other_eta(lab: Lab) -> StepPlan:
    return replace(lab.checkpoint.plan_for(STEPS, eta=0.6), settings=lab.plan.settings)


def _wrong_table(lab: Lab, k: int) -> ParityReport:
    with faults.wrong_table(k):
        return lab.judge(lab.honest("onnx"), upstream=True)


def _wrong_program(lab: Lab, factor: float) -> ParityReport:
    with faults.wrong_program(factor):
        return lab.judge(lab.honest("onnx"), upstream=True)


def _other_golden(lab: Lab, seed: int) -> ParityReport:
    other = replace(lab.checkpoint, denoiser=faults.perturbed(lab.checkpoint.denoiser, seed))
    return faults.with_golden(lab, golden_arrays(other, lab.plan, 4))


def _other_noise(lab: Lab, seed: int, name: str) -> ParityReport:
    drawn = sampler_noise(seed, 4, lab.checkpoint.shape, lab.plan.noisy_steps)
    return faults.with_golden(lab, {name: drawn[name]})


def judged(fault: Fault, lab: Lab) -> dict[str, Any]:
    """Whether the fault was caught, and on what it was blamed."""
    report = fault.run(lab)
    blamed = next((rung.number for rung in report.rungs if rung.verdict == "failed"), None)
    budget = None if report.artefact is None else report.artefact.budget
    step = None if budget is None else budget.first_step
    right = blamed in fault.rungs and (fault.step is None or fault.step == step)
    return {
        "kind": fault.kind, "target": fault.target, "seed": fault.seed, "expected_rungs": list(fault.rungs),
        "blamed_rung": blamed, "expected_step": fault.step, "blamed_step": step, "caught": not report.passed,
        "right": right,
    }  # fmt: skip


def honest(target: str, precision: str, batch: str, output: str, seeds: range, scratch: Path) -> dict[str, Any]:
    """So many whole verifications of one build of digits, each with a golden file of another seed."""
    options = BuildOptions(
        "digits", target, scratch / "honest", precision, batch, output, verify=False, steps=HONEST_STEPS
    )
    shutil.rmtree(options.out, ignore_errors=True)
    good = build(options)
    checkpoint = load_checkpoint("digits")
    plan, lab = checkpoint.plan_for(HONEST_STEPS), Lab(scratch)
    atol = good.manifest.tolerance.atol
    found: dict[str, Any] = {
        "runs": 0, "alarms": 0, "worst": 0.0, "atol": atol, "worst_mean": 0.0, "mean_tolerance": mean_tolerance(atol),
        "messages": [],
    }  # fmt: skip
    for seed in seeds:
        golden = golden_arrays(checkpoint, plan, golden_count(good.manifest.batch), output, seed)
        bundle = lab.sealed(good, lambda folder: faults.copy_artefact(good, folder), golden=golden)
        report = verify(Bundle.open(bundle.folder))
        found["runs"] += 1
        rung = report.rungs[-1]
        found["worst"] = max(found["worst"], rung.worst)
        scaled = [c.mean_abs for c in rung.comparisons if rung.sample_atol is None or c.output != "sample"]
        found["worst_mean"] = max(found["worst_mean"], *scaled)
        if not report.passed:
            found["alarms"] += 1
            found["messages"].append([c.to_dict() for c in rung.failures])
    return found


def summary(cases: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are asked for."""
    return {
        "faults": len(cases),
        "caught": sum(case["caught"] for case in cases.values()),
        "blamed_right": sum(case["right"] for case in cases.values()),
        "honest_verifications": sum(run["runs"] for run in runs.values()),
        "false_alarms": sum(run["alarms"] for run in runs.values()),
    }


def largest(runs: dict[str, Any], key: str) -> dict[str, float]:
    """Of each target and precision."""
    worst: dict[str, float] = {}
    for of, run in runs.items():
        name = of.split(",")[0]
        worst[name] = max(worst.get(name, 0.0), run[key])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--target", choices=TARGETS, help="faults and honest bundles of one target")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tails", action="store_true", help="honest bundles alone, those that set the tolerances")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out: Path = arguments.out or RESULTS / ("honest_tails.json" if arguments.tails else "fault_injection.json")
    parts = ("honest",) if arguments.tails else arguments.parts
    seeds = SEEDS_OF_TAILS if arguments.tails else SEEDS_OF_VERIFICATIONS
    old: dict[str, Any] = {}
    if out.exists() and not arguments.again:
        old = json.loads(out.read_text(encoding="utf-8"))
    cases, runs = old.get("faults", {}), old.get("honest", {})

    def keep() -> None:
        values = {"steps": STEPS, "honest_steps": HONEST_STEPS, "faults": cases, "honest": runs}
        values |= {f"{key}_honest": largest(runs, key) for key in ("worst", "worst_mean")}
        write_result(out, "benchmarks/fault_injection.py", values | {"summary": summary(cases, runs)})

    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for fault in all_faults() if "faults" in parts else ():
            if fault.name in cases or (arguments.target and fault.target != arguments.target):
                continue
            cases[fault.name] = judged(fault, lab)
            print(fault.name, cases[fault.name], flush=True)
            keep()
        for number, (target, precision, batch, output, count) in enumerate(HONEST):
            if "honest" not in parts:
                break
            key = f"{target} {precision}, batch {batch}, {output}"
            if key in runs or (arguments.target and target != arguments.target):
                continue
            first = seeds + 1000 * (number + 1)
            runs[key] = honest(target, precision, batch, output, range(first, first + count), Path(folder))
            print(key, runs[key], flush=True)
            keep()
    print(summary(cases, runs))


if __name__ == "__main__":
    main()
