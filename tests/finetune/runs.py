"""Settings of a run with some changed, and what lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.task import Task

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def changed(settings: FinetuneSettings, **values: Any) -> FinetuneSettings:
    return FinetuneSettings.model_validate(settings.model_dump() | values)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def events_of(run: Path) -> Any:
    """The EventAccumulator of the folder, loaded."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def distance_of(work: Task, images: torch.Tensor) -> float:
    """The held-out Frechet distance that decides."""
    return work.judge(images)[work.holdout.name]["frechet"].value


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / WEIGHTS)


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saved_iteration(settings: FinetuneSettings) -> int:
    with safe_open(settings.out / "state.safetensors", framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["iteration"])
