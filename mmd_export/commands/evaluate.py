"""``mmd-export evaluate``: samples against real images, by any metric on any encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.commands.sample import SampleOptions, draw
from mmd_export.errors import UsageError
from mmd_finetune.compute import full_float32
from mmd_finetune.data import DIGITS, load_images
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import Encoder, load_encoder, require_fit, require_names
from mmd_finetune.metrics import class_histogram
from mmd_finetune.metrics.suite import (
    METRICS,
    NEIGHBOUR_METRICS,
    Features,
    MetricOptions,
    measure,
    parse_metrics,
)

ENCODED_AT_ONCE = 512

Observer = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Scoring:
    """How samples are scored.

    ``data`` and ``held_out_data`` are what ``load_images`` takes, the latter images outside the training set; of
    ``data`` the first ``real_count`` are used, None for all.
    """

    data: str = DIGITS
    encoders: tuple[str, ...] = ("digits-conv", "digits-mlp")
    metrics: tuple[str, ...] = ("frechet",)
    neighbours: int = 5
    resamples: int = 200
    real_count: int | None = None
    held_out_data: str | None = None

    @property
    def options(self) -> MetricOptions:
        """The part that the metrics take."""
        return MetricOptions(self.neighbours, self.resamples)


@dataclass(frozen=True)
class RealImages:
    """``real`` is what samples are compared with; ``training`` and ``held_out`` are for metrics that need both."""

    real: Tensor
    training: Tensor | None
    held_out: Tensor | None


@full_float32()
def evaluate(
    options: SampleOptions, scoring: Scoring, observe: Observer = lambda _what, _done, _of: None
) -> dict[str, Any]:
    """Every metric on every encoder with its interval, and the share of each class where the encoder tells classes.

    With ``data`` digits the samples are compared with all 1,797 scans, and the built-in split serves memorisation.
    Raises UsageError for what cannot be compared, before anything is drawn where that is known by then.
    """
    parse_metrics(scoring.metrics)
    encoders = [load_encoder(name).to(_device()) for name in scoring.encoders]
    if not encoders:
        raise UsageError("encoders are none; name at least one")
    require_names(encoders)
    images = _real_images(scoring)
    _require_enough(options.count, len(images.real), scoring)
    generated = _draw(options, images.real, encoders, scoring, observe)
    metrics, shares = {}, {}
    for encoder in encoders:
        sets = _features(encoder, generated, images, scoring.options, observe)
        observe(f"{encoder.name}: metrics", 0, 1)
        metrics[encoder.name] = {name: found.to_dict() for name, found in measure(scoring.metrics, sets).items()}
        if encoder.classes is not None:
            shares[encoder.name] = class_histogram(encoder, generated.to(_device()))
        observe(f"{encoder.name}: metrics", 1, 1)
    return {
        "source": options.source.rstrip("/").rsplit("/", 1)[-1], "count": options.count, "seed": options.seed,
        "real_images": len(images.real), "held_out_images": 0 if images.held_out is None else len(images.held_out),
        "neighbours": scoring.neighbours, "resamples": scoring.resamples,
        "metrics": metrics, "class_shares": shares,
    }  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each encoder and metric: value, interval, what a perfect model scores."""
    return [
        (encoder, name, f"{found['value']:.4g}", _interval(found), METRICS[name].best)
        for encoder, by_name in result["metrics"].items()
        for name, found in by_name.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw ``result`` as a PNG."""
    from mmd_finetune.metrics.picture import draw_metrics

    draw_metrics(result, path)


def _interval(found: dict[str, float | None]) -> str:
    return "" if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _real_images(scoring: Scoring) -> RealImages:
    needed = [name for name in scoring.metrics if METRICS[name].needs_split]
    if scoring.data == DIGITS and scoring.held_out_data is None:
        split = load_digits_split()
        real, training, held_out = split.all_images, split.train_images, split.held_out_images
    elif needed and scoring.held_out_data is None:
        raise UsageError(f"{', '.join(needed)}: images outside --data {scoring.data} are needed; give --held-out-data")
    else:
        real = training = load_images(scoring.data)
        held_out = training[:0] if scoring.held_out_data is None else load_images(scoring.held_out_data)
    count = len(real) if scoring.real_count is None else scoring.real_count
    if count > len(real):
        raise UsageError(f"--real-count is {count}, --data {scoring.data} holds {len(real)} images; ask for fewer")
    if needed and held_out.shape[1:] != real.shape[1:]:
        raise UsageError(
            f"--held-out-data {scoring.held_out_data}: images are {held_out.shape[1:]}, those of --data are "
            f"{real.shape[1:]} (channels, height, width)"
        )
    compared = _tensor(real[:count])
    if not needed:
        return RealImages(compared, None, None)
    same = training is real and count == len(real)  # then they are encoded once
    return RealImages(compared, compared if same else _tensor(training), _tensor(held_out))


def _tensor(images: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).clone()


def _require_enough(count: int, real: int, scoring: Scoring) -> None:
    k = scoring.neighbours
    if set(NEIGHBOUR_METRICS) & set(scoring.metrics) and not 1 <= k < min(count, real):
        raise UsageError(
            f"--neighbours is {k}, there are {count} samples and {real} real images; give 1 to {min(count, real) - 1}, "
            "or more images"
        )
    if min(count, real) < 2:
        raise UsageError(f"{count} samples and {real} real images; a metric needs at least 2 of each")


def _draw(options: SampleOptions, real: Tensor, encoders: list[Encoder], scoring: Scoring, observe: Observer) -> Tensor:
    """Samples float32 (N, C, H, W) in [-1, 1]; the first part is held against data and encoders."""
    observe("drawing", 0, options.count)
    parts: list[Tensor] = []
    for drawn in draw(options):
        part = _tensor(
            drawn if drawn.dtype == np.float32 else drawn.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        )
        if not parts:
            shape = (part.shape[1], part.shape[2], part.shape[3])
            if shape != real.shape[1:]:
                raise UsageError(
                    f"--data {scoring.data}: images are {tuple(real.shape[1:])}, {options.source} makes {shape} "
                    "(channels, height, width)"
                )
            for encoder in encoders:
                require_fit(encoder, (shape[0], shape[1], shape[2]), gradient=False)
        parts.append(part)
        observe("drawing", sum(map(len, parts)), options.count)
    return torch.cat(parts)


def _features(
    encoder: Encoder, generated: Tensor, images: RealImages, options: MetricOptions, observe: Observer
) -> Features:
    parts = {id(part): part for part in (generated, *vars(images).values()) if part is not None and len(part)}
    total, done = sum(map(len, parts.values())), 0
    encoded: dict[int, Tensor] = {}
    for key, part in parts.items():
        features = []
        for some in part.split(ENCODED_AT_ONCE):
            with torch.inference_mode():
                features.append(encoder(some.to(_device())))
            done += len(some)
            observe(f"{encoder.name}: features", done, total)
        encoded[key] = torch.cat(features)
    training, held_out = encoded.get(id(images.training)), encoded.get(id(images.held_out))
    return Features(encoder.name, encoded[id(images.real)], encoded[id(generated)], options, training, held_out)
