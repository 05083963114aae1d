"""False alarms and power of rung 7 on digits -> benchmarks/results/distribution_rung.json.

An honest repeat draws samples of the ONNX artefact and of the torch reference, on the same noises and on fresh ones, at
the 5 % level. For power the artefact is a sampler of the same weights with one of its five steps left out, each of the
later four in turn, and the rest joined to a sampler of four. Repeats that were made before are kept; ``--again`` starts
afresh.

What must hold, set before anything was run: of the honest repeats so few fail as a test whose true rate of false alarms
is 5 % keeps to in 95 of 100 such runs (15 of 200), and at least 95 % of the repeats without a step fail.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.commands.distribution import (
    DistributionOptions,
    bundle_draw,
    checkpoint_draw,
    distribution_tests,
    pixel_atol,
)
from mmd_export.distribution import FRESH, NUMPY_ENCODERS, SAME, TwoSampleTest
from mmd_export.plan import StepPlan
from mmd_export.runtime import RunOptions
from mmd_runtime.registry import runtime_for

STEPS = 5
LEVEL = 0.05
BATCH = "50"
HONEST, POWER = 200, 80
LEAST_POWER = 0.95
CONFIDENCE = 0.95
Draw = Callable[[int], NDArray[np.float32]]


def opened(options: BuildOptions, count: int) -> tuple[Bundle, Draw]:
    """A bundle, and samples of it; rung 7 is to judge it, so that no other has to."""
    bundle = build(replace(options, batch=BATCH, verify=False))
    return bundle, bundle_draw(bundle, runtime_for(bundle.manifest.format).open(bundle, RunOptions(1)), count)


class Lab:
    """The artefact, the reference, and an artefact that lacks a step."""

    def __init__(self, scratch: Path, options: DistributionOptions) -> None:
        self.options = options
        checkpoint = load_checkpoint("digits")
        bundle, self.honest = opened(BuildOptions("digits", "onnx", scratch / "honest", steps=STEPS), options.count)
        self.atol = pixel_atol(bundle)
        plan = StepPlan.from_dict(bundle.manifest.plan)
        self.reference = checkpoint_draw(bundle, checkpoint, plan, options.count)
        self.dropped = []
        for k in range(1, STEPS):
            rest = tuple(int(t) for i, t in enumerate(plan.timesteps) if i != k)
            made = BuildOptions("digits", "onnx", scratch / f"dropped-{k}", timesteps=rest, steps=None)
            self.dropped.append(opened(made, options.count)[1])

    def repeat(self, number: int, power: bool) -> dict[str, Any]:
        """Both tests of the honest artefact, and of one without a step; each repeat has noises of its own."""
        options = replace(self.options, seed=10_000 + 2 * number)
        known: dict[int, NDArray[np.float32]] = {}

        def reference(seed: int) -> NDArray[np.float32]:
            if seed not in known:
                known[seed] = self.reference(seed)
            return known[seed]

        encode = NUMPY_ENCODERS[options.features]
        found: dict[str, Any] = {"honest": _row(distribution_tests(self.honest, reference, encode, options, self.atol))}
        if power:
            faulty = self.dropped[number % len(self.dropped)]
            found["dropped"] = _row(distribution_tests(faulty, reference, encode, options, self.atol))
            found["step"] = 2 + number % len(self.dropped)
        return found


def _row(tests: tuple[TwoSampleTest, ...]) -> dict[str, Any]:
    numbers = {
        test.noise: {
            "p": test.p_value, "mmd2": test.mmd2, "frechet": test.frechet, "tolerated": test.tolerated,
            "failed": not test.passed,
        }
        for test in tests
    }  # fmt: skip
    return {**numbers, "failed": not all(test.passed for test in tests)}


def most_alarms(repeats: int, level: float = LEVEL, confidence: float = CONFIDENCE) -> int:
    """The quantile of Binomial(repeats, level): no more alarms than this, with at least that probability."""
    below = 0.0
    for alarms in range(repeats + 1):
        below += math.comb(repeats, alarms) * level**alarms * (1.0 - level) ** (repeats - alarms)
        if below >= confidence:
            return alarms
    return repeats


def summary(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates, how often each of the two tests failed, what was found by the step left out, and both criteria."""
    honest = [each["honest"] for each in repeats]
    dropped = [each["dropped"] for each in repeats if "dropped" in each]
    by_step: dict[str, list[bool]] = {}
    for each in repeats:
        if "dropped" in each:
            by_step.setdefault(str(each["step"]), []).append(each["dropped"]["failed"])
    alarms, found = sum(row["failed"] for row in honest), sum(row["failed"] for row in dropped)
    return {
        "honest_repeats": len(honest), "false_alarms": alarms, "false_alarm_rate": alarms / len(honest),
        "most_alarms": most_alarms(len(honest)), "few_alarms": alarms <= most_alarms(len(honest)),
        "alarms_by_test": _failures(honest), "power_repeats": len(dropped),
        "power": found / len(dropped) if dropped else None, "found_by_test": _failures(dropped),
        "power_by_step": {step: float(np.mean(failed)) for step, failed in sorted(by_step.items())},
        "least_power": LEAST_POWER, "enough_power": found >= LEAST_POWER * len(dropped) if dropped else None,
    }  # fmt: skip


def _failures(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {noise: sum(row[noise]["failed"] for row in rows) for noise in (SAME, FRESH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="samples on each side")
    parser.add_argument("--permutations", type=int, default=299)
    parser.add_argument("--features", choices=sorted(NUMPY_ENCODERS), default="projection")
    parser.add_argument("--repeats", type=int, default=HONEST)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "distribution_rung.json")
    arguments = parser.parse_args()
    options = DistributionOptions(arguments.count, arguments.features, level=LEVEL, permutations=arguments.permutations)
    repeats: list[dict[str, Any]] = []
    if arguments.out.exists() and not arguments.again:
        repeats = json.loads(arguments.out.read_text(encoding="utf-8"))["repeats"]
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch), options)
        while len(repeats) < arguments.repeats:
            repeats.append(lab.repeat(len(repeats), len(repeats) < POWER))
            values = {"steps": STEPS, "level": LEVEL, "count": options.count, "features": options.features}
            values |= {"permutations": options.permutations, "summary": summary(repeats), "repeats": repeats}
            write_result(arguments.out, "benchmarks/distribution_rung.py", values)
            print(summary(repeats), flush=True)


if __name__ == "__main__":
    main()
