"""float32 rounding where a plan multiplies the network's output -> benchmarks/results/steep_plans.json.

The first call from pure noise divides by a small alpha, and the rounding of the network's output grows with it. Each
row is one DDIM plan of a model that predicts noise: the largest factor (``StepPlan.output_gain``), the largest
difference of any state between torch in float32 and in float64, and that difference by factor. The models but
``digits`` have random weights. A minute on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, save_cifar10, save_small, write_result
from mmd_export.checkpoint import load_checkpoint
from mmd_export.reference import golden_arrays, run_chain, sampler_of

IMAGES = {"digits": 64, "16x16, 1.6 M parameters": 16, "ddpm-cifar10 architecture": 4}
PLANS: dict[str, dict[str, Any]] = {
    "5 steps, leading": {"steps": 5},
    "5 steps, trailing": {"steps": 5, "spacing": "trailing"},
    "2 steps, timesteps 999,0": {"timesteps": (999, 0)},
    "1 step, trailing": {"steps": 1, "spacing": "trailing"},
}


def rows_of(model: str, source: str) -> list[dict[str, Any]]:
    checkpoint = load_checkpoint(source)
    rows = []
    for name, options in PLANS.items():
        plan = checkpoint.plan_for(**options, sampler="ddim")
        golden = golden_arrays(checkpoint, plan, IMAGES[model], "float32", 0)
        plain = run_chain(sampler_of(checkpoint, plan), {"noise": golden["noise"]})
        states = [f"state.{k}" for k in range(1, plan.step_count + 1)]
        error = max(float(np.abs(plain[state] - golden[state]).max()) for state in states)
        gain = plan.output_gain
        rows.append({"model": model, "plan": name, "gain": gain, "error": error, "error_by_gain": error / gain})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "steep_plans.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        sources = ("digits", str(save_small(small, "epsilon")), str(save_cifar10(large, "epsilon")))
        rows = [row for model, source in zip(IMAGES, sources, strict=True) for row in rows_of(model, source)]
    write_result(arguments.out, "benchmarks/steep_plans.py", {"rows": rows})


if __name__ == "__main__":
    main()
