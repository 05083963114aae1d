"""The model card of the built-in ``digits`` from its training log: text, loss curve, 100-step samples.

``python finetune/recipes/digits_card.py`` writes it anew without training.
"""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL_FOLDER = ROOT / "mmd_export/models/digits"
RESULT_FILE = ROOT / "benchmarks/results/digits_training.json"
AGAIN_FILE = RESULT_FILE.with_name("digits_training_again.json")  # a later run of the recipe, for what it takes
SAMPLE_STEPS, SAMPLE_COUNT, SAMPLE_SEED = 100, 60, 0

CARD = """\
---
library_name: diffusers
license: apache-2.0
tags: [diffusion, digits]
---
# digits

The built-in base model of mmd-export: a UNet2DModel of {parameters:,} parameters that draws handwritten digits,
8x8, one channel, in [-1, 1]. epsilon prediction, 1000 timesteps, linear betas. `make digits` trains it anew.

![100-step DDIM samples](samples.png)

## Data
scikit-learn's copy of the test set of *Optical Recognition of Handwritten Digits* (Alpaydin and Kaynak, UCI, 1998,
CC BY 4.0): 1,797 scans, 80 % to train on, 20 % held out, split by class with a fixed seed.

## Training
{steps:,} steps of AdamW on batches of 128, cosine rate, exponential average of the weights 0.999, dropout 0.1. Held-out
denoising loss at the end {held_out:.4f}, on the training data {loss:.4f}. {seconds:.0f} s on {threads} CPU threads of a
shared machine; at its median pace {quiet:.0f} s. The same recipe, run again on a quiet machine, took {again:.0f} s on
{again_threads} threads.

![loss](curve.png)

## Encoders
Classifiers of different architecture: `digits-conv` and `digits-residual` serve the loss of the finetuning,
`digits-mlp` never does, so that it can judge.

| encoder | held-out accuracy |
|---|---|
{accuracies}

## Limits
Small on purpose: it exists so that every command has something to work on. The scans are those of 13 writers.
"""


def write_card() -> None:
    """README.md, curve.png and samples.png beside the weights, from the log and the weights."""
    from mmd_export.commands.sample import SampleOptions, sample
    from mmd_export.pictures import save_grid

    log: dict[str, Any] = json.loads(RESULT_FILE.read_text(encoding="utf-8"))
    again = json.loads(AGAIN_FILE.read_text(encoding="utf-8"))
    curve = log["curve"]
    draw(curve, MODEL_FOLDER / "curve.png")
    drawn = sample(SampleOptions("digits", SAMPLE_SEED, SAMPLE_COUNT, steps=SAMPLE_STEPS))
    save_grid(drawn, MODEL_FOLDER / "samples.png", columns=15)
    starts = [0.0, *(row["seconds"] for row in curve)]
    pace = statistics.median(after - before for before, after in pairwise(starts))
    text = CARD.format(
        parameters=log["parameters"],
        steps=curve[-1]["step"],
        held_out=curve[-1]["held_out"],
        loss=curve[-1]["loss"],
        seconds=log["seconds"],
        threads=log["environment"]["threads"],
        quiet=log["seconds"] - curve[-1]["seconds"] + pace * len(curve),
        again=again["seconds"],
        again_threads=again["environment"]["threads"],
        accuracies="\n".join(f"| `{name}` | {100 * value:.1f} % |" for name, value in log["held_out_accuracy"].items()),
    )
    (MODEL_FOLDER / "README.md").write_text(text, encoding="utf-8")


def draw(curve: list[dict[str, float]], path: Path) -> None:
    """Training and held-out denoising loss by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("held_out", "held out (average)")):
        axes.plot([row["step"] for row in curve], [row[key] for row in curve], label=label)
    axes.set(xlabel="step", ylabel="denoising loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    write_card()
