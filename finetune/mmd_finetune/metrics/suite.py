"""The metrics by name, each on the features of one encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.metrics.bootstrap import Measured, mean_with_interval
from mmd_finetune.metrics.frechet import frechet
from mmd_finetune.metrics.kernel_distance import cmmd, kid
from mmd_finetune.metrics.memorisation import copying, memorisation
from mmd_finetune.metrics.neighbours import Balls, balls
from mmd_finetune.metrics.real import Real

NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class MetricOptions:
    """``neighbours``: k of precision, recall, density and coverage. ``resamples``: bootstrap draws, 0 for none."""

    neighbours: int = 5
    resamples: int = 200
    seed: int = 0


@dataclass(eq=False)
class Features:
    """What is compared in one encoder: ``real`` (M, d) and ``generated`` (N, d).

    ``training`` and ``held_out`` are the images the model was, and was not, trained on; memorisation needs both. Other
    samples that are compared with the same objects cost what depends on them alone no second time.
    """

    encoder: str
    real: Real
    generated: Tensor
    options: MetricOptions
    training: Real | None = None
    held_out: Real | None = None

    @cached_property
    def balls(self) -> Balls:
        """Computed once for the four metrics that share it."""
        return balls(self.real, self.generated, self.options.neighbours)

    def split(self) -> tuple[Real, Real]:
        """Training and held-out features; raises UsageError without them."""
        if self.training is None or self.held_out is None:
            raise UsageError("memorisation and copying compare with images held out of training; give --held-out-data")
        return self.training, self.held_out


@dataclass(frozen=True)
class Metric:
    """``best``: what a perfect model scores, in words; ``needs_split``: training and held-out images are needed."""

    best: str
    measure: Callable[[Features], Measured]
    needs_split: bool = False


def _distance(function: Callable[[Real, Tensor, int, int], Measured]) -> Callable[[Features], Measured]:
    return lambda sets: function(sets.real, sets.generated, sets.options.resamples, sets.options.seed)


def _share(name: str) -> Callable[[Features], Measured]:
    return lambda sets: mean_with_interval(getattr(sets.balls, name), sets.options.resamples, sets.options.seed)


def _copies(function: Callable[[Real, Real, Tensor, int, int], Measured]) -> Callable[[Features], Measured]:
    return lambda sets: function(*sets.split(), sets.generated, sets.options.resamples, sets.options.seed)


METRICS: dict[str, Metric] = {
    "frechet": Metric("0", _distance(frechet)),
    "kid": Metric("0", _distance(kid)),
    "cmmd": Metric("0", _distance(cmmd)),
    **{name: Metric("1", _share(name)) for name in NEIGHBOUR_METRICS},
    "memorisation": Metric("1/2", _copies(memorisation), needs_split=True),
    "copying": Metric("0", _copies(copying), needs_split=True),
}


def parse_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, checked; raises UsageError that lists the known ones."""
    for name in names:
        if name not in METRICS:
            raise UsageError(f"metric {name!r} is unknown; known: {', '.join(METRICS)}")
    if not names or len(set(names)) != len(names):
        raise UsageError(f"metrics are {', '.join(names) or 'none'}; name at least one, each once")
    return tuple(names)


def needs_split(names: Sequence[str]) -> bool:
    """Whether one of the metrics compares with training and with held-out images."""
    return any(METRICS[name].needs_split for name in names)


def require_while_tuning(names: Sequence[str], *, split: bool = False) -> None:
    """Raise ValueError unless a run can measure the metrics; some only where it holds images out (``split``)."""
    able = [name for name, metric in METRICS.items() if split or not metric.needs_split]
    for name in names:
        if name in METRICS and name not in able:
            raise ValueError(f"{name!r} is not one of {', '.join(able)}; with a holdout_fraction it can be measured")
        if name not in able or list(names).count(name) > 1:
            raise ValueError(f"{name!r} is not one of {', '.join(able)}, or is named twice")


def measure(names: Sequence[str], sets: Features) -> dict[str, Measured]:
    """Every metric of ``names`` on one encoder's features; raises UsageError for features that cannot be compared."""
    _require_comparable(sets)
    return {name: METRICS[name].measure(sets) for name in names}


def _require_comparable(sets: Features) -> None:
    kept = {"real": sets.real, "training": sets.training, "held-out": sets.held_out}
    sides = {side: real.features for side, real in kept.items() if real is not None} | {"generated": sets.generated}
    real = sets.real.features
    for side, features in sides.items():
        where = f"encoder {sets.encoder}: {side} features are {tuple(features.shape)}"
        if features.dim() != 2 or len(features) < 2:
            raise UsageError(f"{where}; (N, d) with N >= 2 is expected")
        if features.shape[1] != real.shape[1]:
            raise UsageError(f"{where}, the real ones {tuple(real.shape)}; both need the same d")
        if bad := int((~torch.isfinite(features)).any(1).sum()):
            raise UsageError(
                f"encoder {sets.encoder}: {bad} of {len(features)} {side} images give NaN or infinite features; "
                "nothing was measured"
            )
