"""``mmd-export evaluate``: samples against real images, by any metric on any encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mmd_export.checkpoints.folder_card import stated_seed
from mmd_export.commands.sample import Drawing, SampleOptions, draw, is_bundle
from mmd_export.errors import UndefinedError, UsageError
from mmd_export.torch_device import torch_device
from mmd_finetune.array_files import Pixels, as_floats
from mmd_finetune.compute import full_float32
from mmd_finetune.data import AS_THEY_ARE, DIGITS, DataOptions, load_real, parse_crop
from mmd_finetune.digits import load_digits_split
from mmd_finetune.feature_cache import FeatureCache, feature_folder
from mmd_finetune.features import Encoder, load_encoder, require_fit, require_names
from mmd_finetune.metrics.memorisation import require_split
from mmd_finetune.metrics.real import Real
from mmd_finetune.metrics.sampling import class_counts
from mmd_finetune.metrics.suite import (
    METRICS,
    NEIGHBOUR_METRICS,
    Features,
    MetricOptions,
    measure,
    parse_metrics,
)
from mmd_finetune.settings import ENCODED_AT_ONCE
from mmd_finetune.world import World, is_first_process, open_world

__all__ = ["Compared", "Observer", "Scoring", "evaluate", "is_first_process", "plot", "preparation", "rows"]

Observer = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""
Notify = Callable[[str], None]
"""Called with a warning."""


@dataclass(frozen=True)
class Scoring:
    """How samples are scored.

    ``data`` and ``held_out_data`` are what ``load_images`` takes, the latter images outside the training set, prepared
    as ``preparation`` says; a ``holdout_fraction`` there holds images of ``data`` out instead. Of ``data`` the first
    ``real_count`` are compared with, None for all.
    """

    data: str = DIGITS
    encoders: tuple[str, ...] = ("digits-conv", "digits-mlp")
    metrics: tuple[str, ...] = ("frechet",)
    neighbours: int = 5
    resamples: int = 200
    real_count: int | None = None
    held_out_data: str | None = None
    preparation: DataOptions = AS_THEY_ARE
    feature_cache: bool = True


@dataclass(frozen=True)
class Compared:
    """``real`` is what samples are compared with, in parts; ``training`` and ``held_out`` are for metrics of both.

    Tensors (N, C, H, W), bytes or floats in [-1, 1].
    """

    real: tuple[Tensor, ...]
    training: Tensor | None
    held_out: Tensor | None

    @property
    def count(self) -> int:
        """How many samples are compared with."""
        return sum(map(len, self.real))


@full_float32()
def evaluate(
    options: SampleOptions,
    scoring: Scoring,
    observe: Observer = lambda _what, _done, _of: None,
    notify: Notify = lambda _: None,
) -> dict[str, Any]:
    """Every metric on every encoder with its interval, and the share of each class where the encoder tells classes.

    With ``data`` digits as it is the samples are compared with all 1,797 scans, and the built-in split serves
    memorisation. Of several processes (torchrun) each draws its share of the samples; the first one reads ``data``,
    measures, and calls ``observe`` and ``notify``; all return the same. A metric that the images leave undefined has
    None for its value. Raises UsageError for what cannot be compared, before anything is drawn where that is known by
    then.
    """
    with open_world(options.device or "auto") as world:
        run = _Run(options, scoring, world, observe if world.is_first else lambda _what, _done, _of: None, notify)
        encoders, drawing = world.together(run.prepare)
        first = world.first_does(lambda: drawing.sha256)
        world.together(lambda: run.require_same(drawing.sha256, first))
        compared: list[Compared] = []  # in the process that read the images; the others need none
        world.first_does(lambda: compared.append(run.compared(drawing.shape())))
        world.first_does(run.warn_of_seed)
        samples = world.together(lambda: run.drawn(drawing))
        encoded = [run.encoded(encoder, samples) for encoder in encoders]
        return world.first_does(lambda: run.result(drawing, encoded, compared[0]))


@dataclass(frozen=True)
class _Encoded:
    """All samples in one encoder: features (N, d), and the share of each class if it tells classes."""

    encoder: Encoder
    features: Tensor
    class_shares: list[float] | None


@dataclass(frozen=True)
class _Run:
    """One evaluation, in one of its processes."""

    options: SampleOptions
    scoring: Scoring
    world: World
    observe: Observer
    notify: Notify = lambda _: None

    @property
    def device(self) -> torch.device:
        """Where this process draws and encodes."""
        return self.world.device if self.world.size > 1 else torch_device(self.options.device)

    def prepare(self) -> tuple[list[Encoder], Drawing]:
        """Encoders that take the samples, and the share of these that this process draws."""
        options, size = self.options, self.world.size
        parse_metrics(self.scoring.metrics)
        torch_device(options.device)
        if size > 1:
            if ":" in (options.device or ""):
                raise UsageError(f"--device {options.device}: each of {size} processes has a GPU of its own; give cuda")
            if size > options.count:
                raise UsageError(f"{size} processes for {options.count} samples; start fewer or raise --count")
            if not is_bundle(options.source):
                options = replace(options, device=str(self.device))
        encoders = [load_encoder(name).to(self.device) for name in self.scoring.encoders]
        if not encoders:
            raise UsageError("encoders are none; name at least one")
        require_names(encoders)
        drawing = draw(options, self.world.share(options.count))
        for encoder in encoders:
            require_fit(encoder, drawing.shape(), gradient=False)
        return encoders, drawing

    def require_same(self, own: str, first: str) -> None:
        """Raise UsageError if this process draws from something else than the first one."""
        if own != first:
            raise UsageError(
                f"{self.options.source} has SHA-256 {own} in process {self.world.rank}, {first} in process 0; "
                "give both the same"
            )

    def compared(self, shape: tuple[int, int, int]) -> Compared:
        """The real images, enough of them."""
        images = _real_images(self.scoring, shape, self.options.source)
        _require_enough(self.options.count, images, self.scoring)
        return images

    def warn_of_seed(self) -> None:
        """Samples of the noise that a run was tuned on flatter it."""
        options = self.options
        if stated_seed(Path(options.source)) == options.seed:
            self.notify(
                f"warning: {options.source} was tuned on the noise of seed {options.seed}; give another --seed for "
                "samples that it has not seen"
            )

    def drawn(self, drawing: Drawing) -> Tensor:
        """This process's samples float32 (N, C, H, W) in [-1, 1], on the CPU."""
        count = len(self.world.share(self.options.count))
        self.observe("drawing", 0, count)
        parts: list[Tensor] = []
        for drawn in drawing.parts:
            parts.append(_tensor(drawn if drawn.dtype == np.float32 else as_floats(drawn.transpose(0, 3, 1, 2))))
            self.observe("drawing", sum(map(len, parts)), count)
        return torch.cat(parts)

    def encoded(self, encoder: Encoder, samples: Tensor) -> _Encoded:
        """The samples of all processes in ``encoder``; each encodes its own."""
        features = self.world.gather(self.world.together(lambda: self._features(encoder, samples)))[0]
        if encoder.classes is None:
            return _Encoded(encoder, features, None)
        counts = self.world.together(lambda: class_counts(encoder, samples, self.device))
        return _Encoded(encoder, features, (self.world.sum(counts) / self.options.count).tolist())

    def _features(self, encoder: Encoder, samples: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for some in samples.split(ENCODED_AT_ONCE):
            with torch.inference_mode():
                parts.append(encoder(some.to(self.device)))
            self.observe(f"{encoder.name}: features", sum(map(len, parts)), len(samples))
        return torch.cat(parts)

    def result(self, drawing: Drawing, encoded: Sequence[_Encoded], images: Compared) -> dict[str, Any]:
        """What ``evaluate`` returns."""
        options, scoring = self.options, self.scoring
        return {
            "source": options.source.rstrip("/").rsplit("/", 1)[-1], "count": options.count, "seed": options.seed,
            "runtime": drawing.ran_in(),
            "real_images": images.count, "held_out_images": 0 if images.held_out is None else len(images.held_out),
            "preparation": asdict(scoring.preparation),
            "neighbours": scoring.neighbours, "resamples": scoring.resamples,
            "metrics": {each.encoder.name: self._measured(self._sets(each, images)) for each in encoded},
            "class_shares": {each.encoder.name: each.class_shares for each in encoded if each.class_shares is not None},
        }  # fmt: skip

    def _sets(self, samples: _Encoded, images: Compared) -> Features:
        """The samples beside the real images."""
        encoder, scoring = samples.encoder, self.scoring
        cache = FeatureCache(feature_folder() if scoring.feature_cache else None, self.device)
        kept = {id(part): part for part in (*images.real, images.training, images.held_out) if part is not None}
        done, total = 0, sum(map(len, kept.values()))
        encoded: dict[int, Tensor] = {}
        for key, part in kept.items():
            encoded[key] = cache(encoder, part)
            done += len(part)
            self.observe(f"{encoder.name}: features of real images", done, total)
        options = MetricOptions(scoring.neighbours, scoring.resamples)
        real = torch.cat([encoded[id(part)] for part in images.real])
        split = (None if part is None else Real(encoded[id(part)]) for part in (images.training, images.held_out))
        return Features(encoder.name, Real(real), samples.features, options, *split)

    def _measured(self, sets: Features) -> dict[str, dict[str, float | None]]:
        found: dict[str, dict[str, float | None]] = {}
        for name in self.scoring.metrics:
            self.observe(f"{sets.encoder}: metrics", len(found), len(self.scoring.metrics))
            try:
                found |= {key: value.to_dict() for key, value in measure((name,), sets).items()}
            except UndefinedError as error:
                self.notify(f"warning: {sets.encoder}: {error}")
                found[name] = {"value": None, "low": None, "high": None}
        self.observe(f"{sets.encoder}: metrics", len(found), len(self.scoring.metrics))
        return found


def preparation(
    resize: str | None, crop: str | None, *, flip: bool | None, holdout_fraction: float | None
) -> DataOptions:
    """The options of the command line under the names that ``finetune`` has; raises UsageError."""
    try:
        box = None if crop is None else parse_crop(crop)
    except ValueError as error:
        raise UsageError(f"--crop {error}") from error
    try:
        return TypeAdapter(DataOptions).validate_python(
            {"resize": resize, "crop": box, "flip": bool(flip), "holdout_fraction": holdout_fraction or 0.0}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]).replace("_", "-")
        raise UsageError(
            f"--{name} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        ) from error


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each encoder and metric: value, interval, what a perfect model scores."""
    return [
        (encoder, name, _value(found), _interval(found), METRICS[name].best)
        for encoder, by_name in result["metrics"].items()
        for name, found in by_name.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw ``result`` as a PNG."""
    from mmd_finetune.metrics.picture import draw_metrics

    draw_metrics(result, path)


def _value(found: dict[str, float | None]) -> str:
    return "undefined" if found["value"] is None else f"{found['value']:.4g}"


def _interval(found: dict[str, float | None]) -> str:
    return "" if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"


def _real_images(scoring: Scoring, shape: tuple[int, int, int], source: str) -> Compared:
    needed = [name for name in scoring.metrics if METRICS[name].needs_split]
    fraction = scoring.preparation.holdout_fraction
    if fraction and scoring.held_out_data is not None:
        raise UsageError(
            f"--holdout-fraction {fraction:g} and --held-out-data {scoring.held_out_data} both say which images are "
            "held out; give one"
        )
    held_out: Tensor | None = None
    if scoring.data == DIGITS and scoring.preparation != AS_THEY_ARE:
        raise UsageError("--data digits has its size and its split; leave --resize, --crop, --flip, --holdout-fraction")
    if scoring.data == DIGITS and scoring.held_out_data is None:
        split = load_digits_split()
        real = [_tensor(split.all_images)]
        training, held_out = _tensor(split.train_images), _tensor(split.held_out_images)
    else:
        loaded = load_real(scoring.data, scoring.preparation, shape)
        training = _tensor(loaded.train)
        if fraction:
            held_out = _tensor(loaded.held_out)
        elif scoring.held_out_data is not None:
            held_out = _tensor(load_real(scoring.held_out_data, scoring.preparation, shape).held_out)
        real = [training, held_out] if fraction and held_out is not None else [training]
    if needed and held_out is None:
        raise UsageError(
            f"{', '.join(needed)}: images outside --data {scoring.data} are needed; give --held-out-data or "
            "--holdout-fraction"
        )
    for flag, name, images in (("data", scoring.data, training), ("held-out-data", scoring.held_out_data, held_out)):
        if images is not None and images.shape[1:] != shape:
            raise UsageError(
                f"--{flag} {name}: images are {tuple(images.shape[1:])}, {source} makes {shape} (channels, height, "
                "width)" + ("; pass --resize crop or stretch" if images.shape[1] == shape[0] else "")
            )
    compared = _first(real, scoring)
    return Compared(compared, training, held_out) if needed else Compared(compared, None, None)


def _first(parts: list[Tensor], scoring: Scoring) -> tuple[Tensor, ...]:
    """The first ``real_count`` images; whole parts stay the tensors they are, so that they are encoded once."""
    total = sum(map(len, parts))
    count = total if scoring.real_count is None else scoring.real_count
    if count > total:
        raise UsageError(f"--real-count is {count}, --data {scoring.data} holds {total} images; ask for fewer")
    return tuple(parts) if count == total else (torch.cat(parts)[:count],)


def _tensor(images: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).clone()


def _require_enough(count: int, images: Compared, scoring: Scoring) -> None:
    real, k = images.count, scoring.neighbours
    if "memorisation" in scoring.metrics and images.training is not None and images.held_out is not None:
        require_split(len(images.training), len(images.held_out))
    if set(NEIGHBOUR_METRICS) & set(scoring.metrics) and not 1 <= k < min(count, real):
        raise UsageError(
            f"--neighbours is {k}, there are {count} samples and {real} real images; give 1 to {min(count, real) - 1}, "
            "or more images"
        )
    if min(count, real) < 2:
        raise UsageError(f"{count} samples and {real} real images; a metric needs at least 2 of each")
