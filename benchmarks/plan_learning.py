"""What is tuned, on digits in 5 steps: all weights, adapters, norms and biases, the plan, weights and plan together.

Writes ``benchmarks/results/plan_learning.json``, a row for each seed and choice, and goes on where it was stopped. The
settings are those of ``finetune/configs/digits.toml`` but for what a row names; the judge is that of
``benchmarks/digits_quality.py``: the distance of five draws of 1,797 samples pooled, to all scans, in the encoder that
no loss sees. 4 to 6 minutes a row on one core.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.digits_quality import Ruler
from benchmarks.tuning_rows import Rows, digits_settings, run_folders, tuned
from mmd_export.checkpoint import load_checkpoint
from mmd_finetune.task import prepare

CHOICES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights and the plan": {"learn": "plan"},
    "all weights and the coefficients": {"learn": "coefficients"},
    "the plan alone": {"tune": "none", "learn": "plan", "plan_learning_rate": 1e-2},
    "norms and biases": {"tune": "norm-bias", "learning_rate": 1e-3},
    "norms, biases and the plan": {"tune": "norm-bias", "learning_rate": 1e-3, "learn": "plan"},
    "LoRA, rank 8": {"tune": "lora", "learning_rate": 1e-3},
}
UNTUNED = "untuned"


def measure(choice: str, seed: int, folder: Path, ruler: Ruler) -> dict[str, Any]:
    """One run and its scores."""
    settings = digits_settings(folder / f"{choice.replace(' ', '-').replace(',', '')}-{seed}", seed, **CHOICES[choice])
    trainable = prepare(settings).trainable()
    count = sum(parameter.numel() for parameter in trainable.parameters() if parameter.requires_grad)
    result, seconds = tuned(settings)
    checkpoint = load_checkpoint(result.folder)
    plan = checkpoint.plan_for()
    scores = ruler.measure(checkpoint, plan.step_count)
    return {
        "seed": seed, "choice": choice, "changes": CHOICES[choice], "tuned_numbers": count, "seconds": seconds,
        "best_iteration": result.best_iteration, "timesteps": [round(timestep, 2) for timestep in plan.timesteps],
        **scores,
    }  # fmt: skip


def untuned(steps: int, ruler: Ruler) -> dict[str, Any]:
    """The model as it is."""
    checkpoint = load_checkpoint("digits")
    scores = ruler.measure(checkpoint, steps)
    timesteps = list(checkpoint.plan_for(steps).timesteps)
    return {
        "seed": 0, "choice": UNTUNED, "changes": {}, "tuned_numbers": 0, "seconds": 0, "best_iteration": 0,
        "timesteps": timesteps, **scores,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean held-out distance of each choice and the seeds that it is of."""
    means = {}
    for choice in sorted({row["choice"] for row in rows}):
        found = [row for row in rows if row["choice"] == choice]
        distances = [row["held_out_distance"] for row in found]
        means[choice] = {"seeds": [row["seed"] for row in found], "mean": round(statistics.mean(distances), 4)}
    return {"summary": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs, to go on after a stop")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_learning.json")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, "benchmarks/plan_learning.py", ("choice", "seed"), summary)
    defaults = digits_settings(Path("unused"), 0)
    ruler = Ruler(defaults.features[0], defaults.holdout[0])
    if rows.find(choice=UNTUNED) is None:
        rows.add(untuned(defaults.steps or 5, ruler))
    with run_folders(arguments.runs) as folder:
        for seed in arguments.seeds:
            for choice in arguments.choices:
                if rows.find(choice=choice, seed=seed) is None:
                    rows.add(measure(choice, seed, folder, ruler))


if __name__ == "__main__":
    main()
