"""Metrics by name on one encoder's features: every one answers, and what cannot be compared is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.metrics import frechet, kernel_distance, memorisation, neighbours
from mmd_finetune.metrics.real import Real
from mmd_finetune.metrics.suite import METRICS, Features, MetricOptions, measure, parse_metrics, require_while_tuning

OPTIONS = MetricOptions(neighbours=3, resamples=20)


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def sets(**changes: Tensor | None) -> Features:
    given = {"real": points(600, 3, 0), "generated": points(600, 3, 1), "training": points(600, 3, 2),
             "held_out": points(500, 3, 3)}  # fmt: skip
    sides = {
        name: side if name == "generated" or side is None else Real(side) for name, side in (given | changes).items()
    }
    return Features("toy", options=OPTIONS, **sides)  # type: ignore[arg-type]


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


ON_REAL_IMAGES = [
    (frechet, "decomposed"), (kernel_distance, "_one_side"), (neighbours, "radii"), (memorisation, "_placed"),
    (memorisation, "_clusters"),
]  # fmt: skip


def test_further_samples_cost_the_real_side_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Tensor]] = []

    def recorded(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(features: Tensor, *given: Any) -> Any:
            seen.append((name, features))
            return compute(features, *given)

        return call

    for module, name in ON_REAL_IMAGES:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    first = sets()
    further = replace(first, generated=points(600, 3, 9))
    measure(tuple(METRICS), first)
    found, generated = measure(tuple(METRICS), further), further.generated
    assert found == measure(tuple(METRICS), sets(generated=generated))
    of_first = [real.features for real in (first.real, first.training, first.held_out) if real is not None]
    on_real = [name for name, features in seen if any(features is each for each in of_first)]
    # each once: _one_side for kid and for cmmd
    assert sorted(on_real) == sorted([*(name for _, name in ON_REAL_IMAGES), "_one_side"])


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
