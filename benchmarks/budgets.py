"""What the studies of step budgets share: the ruler, the tuned cell, the targets."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.budget_tables import REAL
from benchmarks.cells import CellFile, digest
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import UsageError
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.features import Encoder
from mmd_finetune.loop import tune
from mmd_finetune.metrics import frechet_distance, sample_many
from mmd_finetune.metrics.real import Real
from mmd_finetune.metrics.suite import Features, MetricOptions, measure
from mmd_finetune.progress import ProgressBar
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.task import REPORT_SEED

# Noise that neither tuning nor the choice of weights or settings draws.
FIRST_NOISE_SEED = REPORT_SEED + 1000
OPTIONS = MetricOptions(neighbours=5, resamples=100)
ENCODED_AT_ONCE = 500
EVALUATIONS = 10  # of the held-out distance while a cell is tuned


@dataclass(frozen=True)
class Ruler:
    """Measures samples in the encoder of the loss and in ``judge``, which the loss never sees.

    ``real`` (M, C, H, W) is what samples are compared with, ``training`` and ``held_out`` tell memorisation apart.
    ``draws`` of ``count`` samples each are drawn; distances are those of all of them pooled.
    """

    real: Tensor
    training: Tensor
    held_out: Tensor
    loss_encoder: Encoder
    judge: Encoder
    draws: int
    count: int
    batch: int
    device: torch.device

    def measure(self, checkpoint: Checkpoint, steps: int) -> dict[str, Any]:
        """One cell: distances in both encoders, recall as the mean of the draws, memorisation, C_T.

        ``half_recall`` is that of the first samples of a draw in a random half of the real images, as many of each.
        """
        plan = checkpoint.plan_for(steps)
        sampler = UnrolledSampler(AtTimesteps(checkpoint.denoiser.to(self.device), plan.timesteps), plan)
        images = torch.cat([
            sample_many(sampler, checkpoint.shape, self.count, seed, batch=self.batch, device=self.device)
            for seed in range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + self.draws)
        ])  # fmt: skip
        real, drawn, *split = (
            self._encode(self.judge, part) for part in (self.real, images, self.training, self.held_out)
        )
        kept, (training, held_out) = Real(real), map(Real, split)
        sets = [Features(self.judge.name, kept, part, OPTIONS) for part in drawn.split(self.count)]
        recalls = [measure(("recall",), each)["recall"].value for each in sets]
        halves = zip(self._halves(real), drawn.split(self.count), strict=True)
        by_half = [_recall(half, part[: len(half)]) for (half, _), part in halves]
        pooled = Features(self.judge.name, kept, drawn, OPTIONS, training, held_out)
        mine = frechet_distance(self._encode(self.loss_encoder, self.real), self._encode(self.loss_encoder, images))
        return {
            "held_out_distance": round(frechet_distance(real, drawn), 4),
            "held_out_distance_by_draw": [round(frechet_distance(real, each.generated), 4) for each in sets],
            "loss_encoder_distance": round(mine, 4),
            "recall": _mean(recalls),
            "recall_by_draw": _rounded(recalls),
            "half_recall": _mean(by_half),
            "half_recall_by_draw": _rounded(by_half),
            "memorisation": measure(("memorisation",), pooled)["memorisation"].to_dict(),
            "copying": _copying(pooled),
        }

    def measure_real(self) -> dict[str, Any]:
        """What real images reach against real ones: the recall of one half of them in the other, by split."""
        recalls = [_recall(half, other) for half, other in self._halves(self._encode(self.judge, self.real))]
        return {"half_recall": _mean(recalls), "half_recall_by_draw": _rounded(recalls)}

    def _halves(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The real images split in two equal parts at random, one split a draw."""
        rows = [torch.randperm(len(features), generator=torch.Generator().manual_seed(i)) for i in range(self.draws)]
        size = len(features) // 2
        return [(features[each[:size]], features[each[size : 2 * size]]) for each in rows]

    def _encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        encode = encoder.to(self.device)
        with torch.inference_mode():
            parts = [encode(part.to(self.device)) for part in images.split(ENCODED_AT_ONCE)]
        return torch.cat(parts)


def _recall(real: Tensor, others: Tensor) -> float:
    return measure(("recall",), Features("", Real(real), others, OPTIONS))["recall"].value


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _copying(sets: Features) -> dict[str, float | None] | None:
    """C_T; None where samples of a few steps crowd into so few cells that it is not defined."""
    try:
        return measure(("copying",), sets)["copying"].to_dict()
    except UsageError as error:
        print(error, flush=True)
        return None


def tuned(settings: FinetuneSettings, ruler: Ruler) -> Callable[[], dict[str, Any]]:
    """What tunes, going on in the run's folder if it is there, and measures."""

    def work() -> dict[str, Any]:
        start = time.perf_counter()
        with ProgressBar() as observer:
            result = tune(settings, resume=settings.out.exists(), observer=observer)
        print(f"{settings.out.name}: {time.perf_counter() - start:.0f} s in this process", flush=True)
        checkpoint = load_checkpoint(result.folder)
        facts = {"tuning_seconds": result.seconds, "best_iteration": result.best_iteration}
        return facts | ruler.measure(checkpoint, checkpoint.plan_for().step_count)

    return work


def arguments_of(description: str, budgets: Sequence[int], runs: Path, out: Path) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, nargs="+", default=budgets)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", choices=("untuned", "paper", "ours"), default=["untuned", "paper", "ours"]
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=Path, default=runs, help="run folders, to go on from")
    parser.add_argument("--out", type=Path, default=out)
    return parser


# What the paper's loop does beyond its config files: real features of the batch alone, one plain sum of the losses.
PAPER = {"reference": "batch", "balance": "equal"}


@dataclass(frozen=True)
class Recipe:
    """A config file of ``finetune``, and what the study sets beside it; settings that do not exist are left out."""

    config: Path
    given: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, **values: Any) -> FinetuneSettings:
        """The whole; ``values`` win."""
        known = {name: value for name, value in self.given.items() if name in FinetuneSettings.model_fields}
        return make_settings({**known, **values}, self.config)


def study(
    file: CellFile,
    ruler: Ruler,
    recipes: Mapping[str, Recipe],
    arguments: argparse.Namespace,
    untuned: Sequence[int],
) -> None:
    """Fill ``file``: real images, untuned at every budget and at ``untuned``, then each seed, budget and recipe.

    A recipe makes as many network calls at every budget: its own iterations are those of its own steps.
    """
    base = load_checkpoint(next(iter(recipes.values())).settings(out=arguments.runs).model)
    file.measure(REAL, {"splits": ruler.draws}, ruler.measure_real)
    for steps in dict.fromkeys((*arguments.steps, *untuned)) if "untuned" in arguments.methods else ():
        settings = {"steps": steps, "base_sha256": base.sha256}
        file.measure(f"untuned/{steps}", settings, partial(ruler.measure, base, steps))
    for seed, steps, (method, recipe) in product(arguments.seeds, arguments.steps, recipes.items()):
        if method not in arguments.methods:
            continue
        whole = recipe.settings(out=arguments.runs)
        assert whole.steps is not None
        iterations = max(1, round(whole.iterations * whole.steps / steps))
        values = {
            "steps": steps, "seed": seed, "device": arguments.device, "iterations": iterations,
            "evaluate_every": max(1, iterations // EVALUATIONS),
        }  # fmt: skip
        public = {**recipe.settings(**values, out=arguments.runs).public(), "base_sha256": base.sha256}
        place = arguments.runs / f"{method}-{steps}-{seed}-{digest(public)}"
        file.measure(f"{method}/{steps}/{seed}", public, tuned(recipe.settings(**values, out=place), ruler))
