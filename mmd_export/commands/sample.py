"""``mmd-export sample``: a grid of images from a seed, from a bundle, a run folder or a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle
from mmd_export.commands.verify import usable_runtime
from mmd_export.errors import UsageError
from mmd_export.manifest import MANIFEST_NAME
from mmd_export.noise import sampler_noise
from mmd_export.plan_options import PlanOptions
from mmd_export.runtime import RunOptions
from mmd_runtime.chunks import run_in_batches

TORCH_BATCH = 256


@dataclass(frozen=True)
class SampleOptions(PlanOptions):
    """``source``: BUNDLE, RUN or MODEL; the options of the plan are for a MODEL only."""

    source: str
    seed: int = 0
    count: int = 16
    runtime: str | None = None
    checkpoint: str | None = None
    class_label: int | None = None


def is_bundle(source: str) -> bool:
    """Whether ``source`` is a folder that claims to be a bundle."""
    return (Path(source) / MANIFEST_NAME).is_file()


def sample(options: SampleOptions) -> NDArray[Any]:
    """Images float32 (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) from a bundle built so."""
    if options.count < 1:
        raise UsageError(f"--count is {options.count}; it must be at least 1")
    return _from_bundle(options) if is_bundle(options.source) else _from_model(options)


def _from_bundle(options: SampleOptions) -> NDArray[Any]:
    bundle = Bundle.open(options.source)
    options.require_bundle(bundle.name, len(bundle.manifest.plan["steps"]))
    session = usable_runtime(bundle, options.runtime).open(bundle, RunOptions(checkpoint=options.checkpoint))
    specs = {spec.name: spec.shape for spec in bundle.manifest.inputs}
    channels, height, width = (int(size) for size in specs["noise"][1:])
    noisy = int(specs["step_noise"][0]) if "step_noise" in specs else 0
    inputs: dict[str, NDArray[Any]] = dict(sampler_noise(options.seed, options.count, (channels, height, width), noisy))
    if "class_labels" in specs:
        inputs["class_labels"] = _labels(options, None)
    return run_in_batches(session, bundle, inputs)


def _from_model(options: SampleOptions) -> NDArray[Any]:
    from mmd_export.checkpoint import load_checkpoint
    from mmd_export.reference import run_chain, sampler_of

    checkpoint = load_checkpoint(options.source)
    plan = checkpoint.plan_for(**options.wanted)
    sampler = sampler_of(checkpoint, plan)
    parts = []
    for first in range(0, options.count, TORCH_BATCH):
        count = min(TORCH_BATCH, options.count - first)
        inputs: dict[str, NDArray[Any]] = dict(
            sampler_noise(options.seed, count, checkpoint.shape, plan.noisy_steps, first)
        )
        if checkpoint.classes is not None:
            inputs["class_labels"] = _labels(options, checkpoint.classes)[first : first + count]
        parts.append(run_chain(sampler, inputs)["sample"])
    return np.concatenate(parts)


def _labels(options: SampleOptions, classes: int | None) -> NDArray[np.int64]:
    """One label for all, or 0, 1, 2, ... over the classes where their number is known."""
    if options.class_label is not None:
        if options.class_label < 0 or (classes is not None and options.class_label >= classes):
            raise UsageError(f"--class-label is {options.class_label}; the model knows 0 to {(classes or 1) - 1}")
        return np.full(options.count, options.class_label, dtype=np.int64)
    if classes is None:
        raise UsageError("the bundle is class-conditional; pass --class-label")
    return np.arange(options.count, dtype=np.int64) % classes
