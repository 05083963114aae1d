"""Quality of few-step sampling on the built-in digits: untuned against tuned (Frechet distance, classes, seconds).

Writes ``benchmarks/results/digits_quality.json``. One draw is as many samples as there are scans, 1,797. At that size
the distance is noisy: scans drawn again from the scans, with replacement, lie 0.2 from them, give or take 0.1
(``floor``). So the distance is that of all draws pooled, and each draw's own stands beside it. The noise comes from a
seed of its own, used by neither tuning nor the choice of weights or settings. The held-out encoder did serve to choose
both, the latter on tuning seeds 10 to 12. The real side is all 1,797 scans; the loss compares with 1,437 of them. About
20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, write_result
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import Encoder, load_encoder
from mmd_finetune.loop import tune
from mmd_finetune.metrics import class_histogram, frechet_distance, sample_many
from mmd_finetune.progress import ProgressBar
from mmd_finetune.reference import encode_in_batches
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.task import REPORT_SEED

CONFIG = ROOT / "finetune/configs/digits.toml"
FIRST_NOISE_SEED = REPORT_SEED + 1000
DRAWS = 5
FLOOR_DRAWS = 100
UNTUNED_STEPS = (2, 3, 5, 10, 20, 50, 100)
LARGEST_RATIO = 0.2
SMALLEST_CLASS = 0.03
LARGEST_SECONDS = 240.0


class Ruler:
    """Measures a checkpoint's samples in the loss encoder and in the held-out one."""

    def __init__(self, training: str, held_out: str) -> None:
        self.real = torch.from_numpy(load_digits_split().all_images).clone()
        self.training, self.held_out = load_encoder(training), load_encoder(held_out)

    def measure(self, checkpoint: Checkpoint, steps: int) -> dict[str, Any]:
        """Distances of all draws pooled and of each, and the class histogram of the pool."""
        plan = checkpoint.plan_for(steps)
        sampler = UnrolledSampler(AtTimesteps(checkpoint.denoiser, plan.timesteps), plan)
        seeds = range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + DRAWS)
        draws = [sample_many(sampler, checkpoint.shape, len(self.real), seed) for seed in seeds]
        pool = torch.cat(draws)
        return {
            "steps": steps,
            "held_out_distance": self._distance(self.held_out, pool),
            "held_out_distance_by_draw": [self._distance(self.held_out, images) for images in draws],
            "training_encoder_distance": self._distance(self.training, pool),
            "classes": [round(part, 4) for part in class_histogram(self.held_out, pool)],
        }

    def floor(self) -> dict[str, float]:
        """What one draw of real scans, with replacement, scores against the scans."""
        features = encode_in_batches(self.held_out, self.real)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(len(features), (len(features),), generator=generator) for _ in range(FLOOR_DRAWS)]
        distances = [frechet_distance(features[drawn], features) for drawn in rows]
        return {"mean": round(statistics.mean(distances), 4), "deviation": round(statistics.stdev(distances), 4)}

    def _distance(self, encoder: Encoder, images: torch.Tensor) -> float:
        features, real = encode_in_batches(encoder, images), encode_in_batches(encoder, self.real)
        return round(frechet_distance(features, real), 4)


def tune_and_measure(settings: FinetuneSettings, ruler: Ruler) -> dict[str, Any]:
    start = time.perf_counter()
    with ProgressBar() as observer:
        result = tune(settings, observer=observer)
    seconds = round(time.perf_counter() - start, 1)
    tuned = load_checkpoint(result.folder)
    measured = ruler.measure(tuned, tuned.plan_for().step_count)
    return {"seed": settings.seed, "seconds": seconds, "best_iteration": result.best_iteration, **measured}


def verdict(untuned: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst seed on pooled draws against the targets, and how many single draws of 1,797 would reach them too."""
    by_steps = {row["steps"]: row for row in untuned}
    five, ten = (by_steps[steps]["held_out_distance"] for steps in (5, 10))
    worst = max(row["held_out_distance"] for row in tuned)
    numbers = {
        "worst_ratio_to_untuned_5_steps": round(worst / five, 4),
        "worst_ratio_to_untuned_10_steps": round(worst / ten, 4),
        "smallest_class": min(min(row["classes"]) for row in tuned),
        "longest_seconds": max(row["seconds"] for row in tuned),
    }
    reached = (
        numbers["worst_ratio_to_untuned_5_steps"] <= LARGEST_RATIO
        and numbers["worst_ratio_to_untuned_10_steps"] < 1.0
        and numbers["smallest_class"] >= SMALLEST_CLASS
        and numbers["longest_seconds"] <= LARGEST_SECONDS
    )
    before, longer = (by_steps[steps]["held_out_distance_by_draw"] for steps in (5, 10))
    single = [
        after <= LARGEST_RATIO * five_steps and after < ten_steps
        for row in tuned
        for after, five_steps, ten_steps in zip(row["held_out_distance_by_draw"], before, longer, strict=True)
    ]
    return {**numbers, "reached": reached, "single_draws": len(single), "single_draws_that_reach": sum(single)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--untuned", type=int, nargs="+", default=UNTUNED_STEPS, help="step counts, 5 and 10 among them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_quality.json")
    arguments = parser.parse_args()
    defaults = make_settings({"out": "unused"}, CONFIG)
    ruler, base = Ruler(defaults.features[0], defaults.holdout[0]), load_checkpoint(defaults.model)
    untuned = []
    for steps in arguments.untuned:
        untuned.append(ruler.measure(base, steps))
        print(untuned[-1], flush=True)
    tuned = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            settings = make_settings({"seed": seed, "out": Path(folder) / f"seed-{seed}"}, CONFIG)
            tuned.append(tune_and_measure(settings, ruler))
            print(tuned[-1], flush=True)
    values = {
        "samples_a_draw": len(ruler.real),
        "draws": DRAWS,
        "floor": ruler.floor(),
        "encoders": {"training": ruler.training.name, "held_out": ruler.held_out.name},
        "settings": defaults.public(),
        "untuned": untuned,
        "tuned": tuned,
        "verdict": verdict(untuned, tuned),
    }
    write_result(arguments.out, "benchmarks/digits_quality.py", values)
    print(values["verdict"])


if __name__ == "__main__":
    main()
