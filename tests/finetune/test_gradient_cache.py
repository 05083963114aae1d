"""Micro-batches: the gradient of the whole batch's statistic, exactly, in the memory of one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmd_finetune import statistic
from mmd_finetune.gradient_cache import backward
from mmd_finetune.objective import add_gradient, split_inputs
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import Task, prepare
from tests.finetune.live_bytes import peak_bytes

BATCH = 12


def task_of(settings: FinetuneSettings, **values: Any) -> Task:
    return prepare(FinetuneSettings.model_validate(settings.model_dump() | {"batch_size": BATCH} | values))


def gradient_of(task: Task, iteration: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses and the gradient by parameter of one iteration."""
    state = TuningState(task.base.denoiser, 1e-3)
    losses = add_gradient(task, task.tuning_sampler(state.denoiser), task.noise_of(iteration), iteration)
    gradients = {name: each.grad for name, each in state.parameters.items() if each.grad is not None}
    assert len(gradients) == len(state.parameters)
    return losses, gradients


def largest_relative_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over the tensors, each against its own norm, or a thousandth of the whole norm where it hardly has a gradient."""
    floor = 1e-3 * float(torch.stack([each.norm() for each in expected.values()]).norm())
    return max(
        float((gradients[name] - each).norm()) / max(float(each.norm()), floor) for name, each in expected.items()
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"eta": 1.0, "kernel": "cubic"},
        {"kernel": "energy", "reference": "batch", "checkpoint_calls": True},
        {"kernel": "laplace", "reference": "nystrom", "landmarks": 64, "channels_last": True},
        {"features": ("pixels",), "estimator": "biased"},
    ],
    ids=str,
)
@pytest.mark.parametrize("micro", [1, 5, 6])
def test_micro_batches_give_the_gradient_of_one_pass(
    micro: int, values: dict[str, Any], tiny_settings: FinetuneSettings
) -> None:
    losses, expected = gradient_of(task_of(tiny_settings, **values))
    again, gradients = gradient_of(task_of(tiny_settings, micro_batch_size=micro, **values))
    assert largest_relative_error(gradients, expected) < 1e-5
    for name, loss in losses.items():
        assert float(again[name]) == pytest.approx(float(loss), rel=1e-5, abs=1e-7)


def test_plain_accumulation_is_another_gradient(tiny_settings: FinetuneSettings) -> None:
    """The mean of the micro-batches' own MMD^2, as MMD-DDM's code accumulates: the comparison above would see it."""
    task = task_of(tiny_settings)
    _, expected = gradient_of(task)
    state = TuningState(task.base.denoiser, 1e-3)
    sampler = task.tuning_sampler(state.denoiser)
    for part in split_inputs(task.noise_of(3), 6):
        losses = add_gradient(task, sampler, part, 3)
        assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    accumulated = {name: each.grad / 2 for name, each in state.parameters.items() if each.grad is not None}
    assert largest_relative_error(accumulated, expected) > 1e-2


def test_one_micro_batch_is_bit_for_bit_the_single_pass(tiny_settings: FinetuneSettings) -> None:
    _, expected = gradient_of(task_of(tiny_settings))
    _, gradients = gradient_of(task_of(tiny_settings, micro_batch_size=BATCH))
    assert all(torch.equal(gradients[name], each) for name, each in expected.items())


def test_each_part_is_generated_twice_but_the_last() -> None:
    calls: list[tuple[int, bool]] = []
    weight = torch.tensor(2.0, requires_grad=True)

    def features_of(p: int) -> dict[str, Tensor]:
        calls.append((p, torch.is_grad_enabled()))
        return {"only": weight * torch.full((1, 1), float(p + 1))}

    backward(3, features_of, lambda features: {"only": features["only"].prod()}, {"only": 1.0})
    assert calls == [(0, False), (1, False), (2, True), (0, True), (1, True)]
    assert weight.grad is not None
    assert float(weight.grad) == 3 * 6 * 2.0**2  # d/dw of (w)(2w)(3w)


def test_weights_and_any_parameter_behind_the_features() -> None:
    # A parameter that is no network's, as the coefficients of a plan are, and one that only one encoder sees.
    scale, shift = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.5, 0.5))
    x = torch.arange(6.0, dtype=torch.float64)[:, None]

    def features(rows: Tensor) -> dict[str, Tensor]:
        return {"a": scale * rows, "b": (scale * rows + shift).sin()}

    def losses(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (values @ values.T).square().mean() for name, values in found.items()}

    weights = {"a": 0.25, "b": 2.0}
    whole = losses(features(x))
    expected = torch.autograd.grad(weights["a"] * whole["a"] + weights["b"] * whole["b"], (scale, shift))
    parts = x.split(4)
    backward(len(parts), lambda p: features(parts[p]), losses, weights)
    assert scale.grad is not None
    assert shift.grad is not None
    torch.testing.assert_close((scale.grad, shift.grad), expected, rtol=1e-12, atol=0)


def test_split_inputs_cut_images_not_steps() -> None:
    noise, step_noise = torch.arange(5), torch.arange(10).reshape(2, 5)
    parts = list(split_inputs({"noise": noise, "step_noise": step_noise}, 2))
    assert [part["noise"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[1]["step_noise"].tolist() == [[2, 3], [7, 8]]
    assert [part["noise"].tolist() for part in split_inputs({"noise": noise}, None)] == [[0, 1, 2, 3, 4]]


def peak_of(task: Task) -> int:
    """Bytes of tensors that one iteration adds at its peak."""
    state = TuningState(task.base.denoiser, 1e-3)
    sampler, noise = task.tuning_sampler(state.denoiser), task.noise_of(0)
    add_gradient(task, sampler, noise, 0)  # the gradients' own memory
    return peak_bytes(lambda: add_gradient(task, sampler, noise, 0))


def test_a_large_batch_costs_the_memory_of_its_micro_batch(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(statistic.BLOCKS, "cpu", (16, 64))  # megabytes whatever the batch is, but this model has less
    given: dict[str, Any] = {"features": ("pixels",), "kernel": "cubic"}
    small = peak_of(task_of(tiny_settings, batch_size=16, **given))
    large = peak_of(task_of(tiny_settings, batch_size=256, micro_batch_size=16, **given))
    one_pass = peak_of(task_of(tiny_settings, batch_size=256, **given))
    assert large < 1.5 * small
    assert one_pass > 8.0 * small  # the same count sees the memory that is saved


def test_memory_does_not_grow_with_the_steps_when_calls_are_recomputed(tiny_settings: FinetuneSettings) -> None:
    few, many = (
        peak_of(task_of(tiny_settings, steps=steps, batch_size=24, checkpoint_calls=True)) for steps in (2, 20)
    )
    kept = peak_of(task_of(tiny_settings, steps=20, batch_size=24))
    assert many < 1.2 * few
    assert kept > 5.0 * few


def test_the_count_of_bytes_by_hand() -> None:
    def work() -> None:
        a = torch.zeros(1000)
        b = a + 1.0
        del a
        c = b.view(10, 100) * 2.0
        del b
        c.sum()

    assert 8000 <= peak_bytes(work) < 8100  # two of 4,000 bytes at once; a view costs nothing


class Drawing(nn.Module):
    """An encoder that draws from torch's own generator, as one with random crops does."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * (1.0 + 0.5 * torch.rand(len(images), 1))


def test_an_encoder_that_draws_sees_the_same_in_both_passes(tiny_settings: FinetuneSettings) -> None:
    task = task_of(tiny_settings, features=("pixels",), micro_batch_size=5)
    (reference,) = task.references
    object.__setattr__(reference.encoder, "network", Drawing())
    seen: list[Tensor] = []

    state = TuningState(task.base.denoiser, 1e-3)
    sampler = task.tuning_sampler(state.denoiser)
    reference.encoder.network.register_forward_hook(lambda *seen_by: seen.append(seen_by[2].detach()))
    add_gradient(task, sampler, task.noise_of(0), 0)
    first, second, third, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)
    assert len(third) == BATCH - 10
