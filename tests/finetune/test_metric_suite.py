"""Metrics by name on one encoder's features: every one answers, and what cannot be compared is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.metrics.suite import METRICS, Features, MetricOptions, measure, parse_metrics, require_while_tuning

OPTIONS = MetricOptions(neighbours=3, resamples=20)


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def sets(**changes: Tensor | None) -> Features:
    given = {"real": points(600, 3, 0), "generated": points(600, 3, 1), "training": points(600, 3, 2),
             "held_out": points(500, 3, 3)}  # fmt: skip
    return Features("toy", options=OPTIONS, **{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_answers_with_an_interval_around_the_perfect_value(name: str) -> None:
    found = measure((name,), sets())[name]
    perfect = {"0": 0.0, "1": 1.0, "1/2": 0.5}[METRICS[name].best]
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    # both sides are the same Gaussian: nothing is far from perfect; C_T is a z-score
    assert found.value == pytest.approx(perfect, abs=2.0 if name == "copying" else 0.1)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_sees_another_law(name: str) -> None:
    shifted = sets(generated=points(600, 3, 1) + 3.0)
    near, far = measure((name,), sets())[name].value, measure((name,), shifted)[name].value
    worse = {"0": abs(far) > abs(near) + 0.1, "1": far < near - 0.1, "1/2": True}[METRICS[name].best]
    assert worse


def test_names_are_checked() -> None:
    assert parse_metrics(["kid", "recall"]) == ("kid", "recall")
    with pytest.raises(UsageError, match="metric 'fid' is unknown; known: frechet, kid, cmmd"):
        parse_metrics(["fid"])
    with pytest.raises(UsageError, match="metrics are kid, kid; name at least one, each once"):
        parse_metrics(["kid", "kid"])
    with pytest.raises(ValueError, match="'memorisation' is not one of frechet"):
        require_while_tuning(("memorisation",))


def test_memorisation_without_a_split_is_refused() -> None:
    with pytest.raises(UsageError, match="--held-out-data"):
        measure(("memorisation",), sets(held_out=None))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"generated": torch.full((5, 3), float("nan"))}, "5 of 5 generated images give NaN"),
        ({"generated": points(5, 4, 0)}, r"generated features are \(5, 4\), the real ones \(600, 3\)"),
        ({"real": points(1, 3, 0)}, r"real features are \(1, 3\); \(N, d\) with N >= 2"),
        ({"held_out": torch.zeros(4)}, r"held-out features are \(4,\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Tensor], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        measure(("frechet",), sets(**changes))
