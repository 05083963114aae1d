"""Weights of the encoders: closed forms, scale, and what they do to a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmd_export.errors import UsageError
from mmd_finetune import loop
from mmd_finetune.balance import balanced_weights, equal_weights, real_level, weights_of
from mmd_finetune.encoder import Encoder
from mmd_finetune.kernels import KERNELS, Linear
from mmd_finetune.loop import tune
from mmd_finetune.mmd import mean_of_pairs, unbiased_mmd2
from mmd_finetune.reference import Reference, encode_in_batches, make_reference
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.state import TuningState
from mmd_finetune.task import Task, prepare


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.factor


def normal(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(seed)) + shift


def encoded(encoder: Encoder, kernel: str) -> Reference:
    return make_reference(encoder, kernel, encode_in_batches(encoder, normal(600, 0)))


def reference(factor: float, kernel: str, name: str = "") -> Reference:
    return encoded(Encoder(name or f"times {factor:g}", Scaled(factor)), kernel)


def test_the_levels_decide() -> None:
    weights = weights_of({"large": 300.0, "small": 3.0})
    assert weights == pytest.approx({"large": 0.5 * 151.5 / 300.0, "small": 0.5 * 151.5 / 3.0})
    # Each term starts at the same height, the sum at the height of the plain mean.
    assert weights["large"] * 300.0 == pytest.approx(weights["small"] * 3.0)
    assert weights["large"] * 300.0 + weights["small"] * 3.0 == pytest.approx(151.5)
    assert weights_of({"only": 7.0}) == {"only": 1.0}
    assert weights_of({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


def test_scale_of_features_does_not_matter() -> None:
    # The linear kernel's MMD^2 grows with the square of the scale: 10,000 times here.
    references = (reference(1.0, "linear"), reference(100.0, "linear"))
    weights = balanced_weights(references, normal(64, 1, shift=1.0), 32)
    losses = [
        weights[each.encoder.name] * float(each.mmd2(each.encoder(normal(64, 2, shift=1.0)))) for each in references
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = equal_weights(references)
    unequal = [
        plain[each.encoder.name] * float(each.mmd2(each.encoder(normal(64, 2, shift=1.0)))) for each in references
    ]
    assert unequal[1] > 1000 * unequal[0]


def test_noise_of_real_images_by_many_draws() -> None:
    made = reference(1.0, "gaussian")
    n = 20
    population = normal(1500, 3).flatten(1).double()
    real_mean = mean_of_pairs(made.kernel, population)
    batches = [normal(n, 100 + i).flatten(1).double() for i in range(300)]
    draws = torch.stack([unbiased_mmd2(made.kernel, batch, population, real_mean) for batch in batches])
    assert real_level(made.kernel, population, n) == pytest.approx(float(draws.std()), rel=0.15)


def test_noise_of_the_linear_kernel_in_closed_form() -> None:
    # h(x, y) = <x - m, y - m>, so E h^2 = tr(C^2) = d for the unit normal.
    real = normal(4000, 4).flatten(1).double()
    assert real_level(Linear(), real[:2000], 10) == pytest.approx(math.sqrt(2 * 6 / (10 * 9)), rel=0.05)


def test_an_encoder_in_which_the_model_is_perfect_does_not_rule() -> None:
    # In one encoder the samples are as real ones; its tiny MMD^2 would give it nearly all weight.
    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            flat = images.flatten(1)
            return flat - flat.mean(1, keepdim=True)

    references = (reference(1.0, "linear", "sees"), encoded(Encoder("blind", Blind()), "linear"))
    samples = normal(64, 5, shift=3.0)
    weights = balanced_weights(references, samples, 32)
    level = real_level(references[1].kernel, references[1].features, 32)
    untuned = float(references[0].mmd2(references[0].encoder(samples)))
    assert weights["blind"] / weights["sees"] == pytest.approx(untuned / level, rel=0.05)


def test_an_untuned_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="the MMD\\^2 of the untuned model is nan; use another encoder"):
        balanced_weights((reference(1.0, "linear"),), torch.full((8, 1, 2, 3), float("nan")), 4)


def test_a_run_weighs_its_encoders_and_says_so(tiny_settings: FinetuneSettings) -> None:
    settings = tiny_settings.model_copy(update={"balance": "untuned"})
    tune(settings)
    lines = [json.loads(line) for line in (tiny_settings.out / "log.jsonl").read_text().splitlines()]
    weights = lines[0]["loss_weights"]
    assert set(weights) == {"digits-conv", "pixels"}
    assert weights["digits-conv"] != pytest.approx(weights["pixels"], rel=0.01)
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(sum(weights[name] * value for name, value in line["losses"].items()))
    assert prepare(settings).loss_weights == weights  # the same after a resume


def test_the_gradient_is_that_of_the_weighted_sum(tiny_settings: FinetuneSettings) -> None:
    work = prepare(tiny_settings)

    def norm(task: Task) -> float:
        state = TuningState(task.base.denoiser, 1e-3)
        _, gradient = loop.iterate(task, state, task.sampler(state.denoiser), 0)
        return gradient

    only_pixels = norm(replace(work, loss_weights={"digits-conv": 0.0, "pixels": 3.0}))
    alone = norm(prepare(tiny_settings.model_copy(update={"features": ("pixels",)})))
    assert only_pixels == pytest.approx(3.0 * alone, rel=1e-4)
    assert norm(work) != pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_encoders_are_of_like_scale_unless_the_kernel_is_a_polynomial(kernel: str) -> None:
    """Of the untuned digits in 2 steps, as ``docs/encoders.md`` says."""
    given = {"model": "digits", "steps": 2, "out": Path("unused"), "kernel": kernel, "evaluate_count": 64}
    weights = prepare(make_settings({**given, "balance": "untuned"})).loss_weights.values()
    assert (max(weights) < 4.0 * min(weights)) == (kernel not in ("linear", "cubic", "polynomial"))


def test_shipped_encoders_count_the_same_and_others_are_weighed(tiny_settings: FinetuneSettings) -> None:
    assert not tiny_settings.balanced
    assert prepare(tiny_settings).loss_weights == {"digits-conv": 0.5, "pixels": 0.5}
    others = {"features": ("pixels", "torchscript:some.pt")}
    assert tiny_settings.model_copy(update=others).balanced
    assert not tiny_settings.model_copy(update={**others, "balance": "equal"}).balanced


def test_landmarks_change_no_weight(tiny_settings: FinetuneSettings) -> None:
    bank = tiny_settings.model_copy(update={"balance": "untuned"})
    landmarks = bank.model_copy(update={"reference": "nystrom", "landmarks": 1})
    assert prepare(landmarks).loss_weights == prepare(bank).loss_weights


def test_equal_weights_on_demand(tiny_settings: FinetuneSettings) -> None:
    work = prepare(tiny_settings.model_copy(update={"balance": "equal"}))
    assert work.loss_weights == {"digits-conv": 0.5, "pixels": 0.5}
    alone = prepare(tiny_settings.model_copy(update={"features": ("pixels",)}))
    assert alone.loss_weights == {"pixels": 1.0}
