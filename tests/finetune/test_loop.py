"""Whole runs on a tiny model: what they leave, and that they repeat."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmd_export.checkpoint import load_checkpoint
from mmd_finetune import loop, task
from mmd_finetune.loop import Report, learning_rate, tune
from mmd_finetune.metrics import sample_many
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import REPORT_SEED, prepare
from tests.finetune.runs import changed, distance_of, log_of, same_weights, without_seconds


def test_a_run_folder_is_a_diffusers_folder_and_more(tiny_settings: FinetuneSettings, tiny_model: Path) -> None:
    reports: list[Report] = []
    said: list[str] = []
    result = tune(tiny_settings, observer=reports.append, notify=said.append)
    assert said == ["measuring the untuned sampler"]
    run = tiny_settings.out
    assert sorted(path.name for path in run.iterdir()) == [
        "README.md", "after.png", "before.png", "curve.png", "log.jsonl", "plan.json", "result.json", "scheduler",
        "settings.json", "unet",
    ]  # fmt: skip
    for config in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert (run / config).read_bytes() == (tiny_model / config).read_bytes()
    tuned = load_checkpoint(run)
    assert tuned.plan == load_checkpoint(tiny_model).plan_for(2)
    assert tuned.sha256 != load_checkpoint(tiny_model).sha256
    assert [report.iteration for report in reports] == list(range(1, 7))
    assert reports[-1].best == min(line["held_out"] for line in log_of(run) if "held_out" in line)
    assert result.iterations == 6
    assert math.isfinite(result.held_out_after)


def test_diffusers_itself_loads_the_run_folder(tiny_settings: FinetuneSettings) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    tune(tiny_settings)
    unet = UNet2DModel.from_pretrained(tiny_settings.out / "unet")
    assert DDIMScheduler.from_pretrained(tiny_settings.out / "scheduler").config.prediction_type == "v_prediction"
    x = torch.randn(2, 1, 8, 8)
    ours = load_checkpoint(tiny_settings.out).denoiser(x, torch.tensor([10]))
    assert torch.equal(unet(x, torch.tensor([10])).sample, ours)


def test_the_log_and_the_result_agree_with_what_is_shipped(tiny_settings: FinetuneSettings) -> None:
    result = tune(tiny_settings)
    lines = log_of(tiny_settings.out)
    assert [line["iteration"] for line in lines] == list(range(7))
    assert [line["iteration"] for line in lines if "held_out" in line] == [0, 2, 4, 6]
    assert set(lines[1]) == {"iteration", "loss", "losses", "gradient", "seconds"}
    best = min((line for line in lines if "held_out" in line), key=lambda line: line["held_out"])
    assert result.best_iteration == best["iteration"]
    work = prepare(tiny_settings)
    shipped = load_checkpoint(tiny_settings.out).denoiser
    assert distance_of(work, work.samples(shipped, task.SELECTION_SEED)) == best["held_out"]
    assert distance_of(work, work.samples(shipped, REPORT_SEED)) == result.held_out_after
    assert distance_of(work, work.samples(work.base.denoiser, REPORT_SEED)) == result.held_out_before


def test_pictures_card_and_settings_say_no_path(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    tune(tiny_settings)
    run = tiny_settings.out
    sheets = [np.asarray(Image.open(run / name)) for name in ("before.png", "after.png")]
    assert sheets[0].shape == sheets[1].shape
    assert not np.array_equal(sheets[0], sheets[1])
    card = (run / "README.md").read_text()
    for fact in ("digits-mlp", "digits-conv", "gaussian", "2 steps", "before", "licence", "`tiny`"):
        assert fact in card
    for name in ("README.md", "settings.json", "result.json", "plan.json", "log.jsonl"):
        assert str(tmp_path.parent) not in (run / name).read_text()


def test_tuning_lowers_the_distance(tiny_settings: FinetuneSettings) -> None:
    settings = changed(
        tiny_settings, iterations=40, evaluate_every=10, batch_size=32, learning_rate=3e-3, evaluate_count=64
    )
    result = tune(settings)
    assert result.held_out_after < 0.8 * result.held_out_before


def test_one_seed_repeats_bit_for_bit(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    first = tune(tiny_settings)
    second = tune(changed(tiny_settings, out=tmp_path / "again"))
    assert same_weights(first.folder, second.folder)
    assert without_seconds(log_of(first.folder)) == without_seconds(log_of(second.folder))
    for name in ("before.png", "after.png", "plan.json", "settings.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    other = tune(changed(tiny_settings, out=tmp_path / "other", seed=1))
    assert not same_weights(first.folder, other.folder)


@pytest.mark.parametrize(
    "values", [{"eta": 1.0}, {"sampler": "ddpm"}, {"spacing": "trailing"}, {"features": ("pixels",)}]
)
def test_other_samplers_and_several_encoders(values: dict[str, Any], tiny_settings: FinetuneSettings) -> None:
    settings = changed(tiny_settings, iterations=2, **values)
    tune(settings)
    assert set(log_of(settings.out)[-1]["losses"]) == set(settings.features)
    plan = load_checkpoint(settings.out).plan
    assert plan is not None
    assert plan == prepare(settings).plan


def test_dropout_is_off(tiny_settings: FinetuneSettings) -> None:
    work = prepare(tiny_settings)
    state = TuningState(work.base.denoiser, 1e-3)
    dropouts = [module for module in state.denoiser.modules() if isinstance(module, nn.Dropout)]
    assert any(module.p == 0.3 for module in dropouts)
    sampler = work.sampler(state.denoiser)
    assert torch.equal(sampler(**work.noise_of(0)), sampler(**work.noise_of(0)))
    loop.iterate(work, state, sampler, 0)
    assert not any(module.training for module in state.denoiser.modules())
    state.denoiser.train()  # the same check sees dropout when it is on
    assert not torch.equal(sampler(**work.noise_of(0)), sampler(**work.noise_of(0)))


def test_the_base_is_never_changed(tiny_settings: FinetuneSettings) -> None:
    work = prepare(tiny_settings)
    before = {name: tensor.clone() for name, tensor in work.base.denoiser.state_dict().items()}
    state = TuningState(work.base.denoiser, 1e-2)
    loop.iterate(work, state, work.sampler(state.denoiser), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in work.base.denoiser.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.denoiser.state_dict().items())


def test_every_iteration_draws_its_own_noise(tiny_settings: FinetuneSettings) -> None:
    work = prepare(changed(tiny_settings, eta=1.0))
    first, second, again = work.noise_of(0), work.noise_of(1), work.noise_of(0)
    assert set(first) == {"noise", "step_noise"}
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], second[name])


def test_the_average_by_hand(tiny_settings: FinetuneSettings) -> None:
    state = TuningState(prepare(tiny_settings).base.denoiser, 1e-3)
    start = next(state.average.parameters()).clone()
    with torch.no_grad():
        next(state.denoiser.parameters()).add_(1.0)
    state.update_average(0.9)
    torch.testing.assert_close(next(state.average.parameters()), start + 0.1)
    state.update_average(0.9)
    torch.testing.assert_close(next(state.average.parameters()), start + 0.19)


def test_gradient_is_clipped(tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    work = prepare(changed(tiny_settings, clip_gradient=1e-3))
    state = TuningState(work.base.denoiser, 1e-3)
    norms: list[float] = []

    def remember(*_: Any) -> None:
        gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
        norms.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))

    monkeypatch.setattr(state.optimiser, "step", remember)
    _, before = loop.iterate(work, state, work.sampler(state.denoiser), 0)
    assert before > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_learning_rates(tiny_settings: FinetuneSettings) -> None:
    assert [learning_rate(changed(tiny_settings, rate_decay="constant"), i) for i in (0, 5)] == [1e-3, 1e-3]
    cosine = changed(tiny_settings, rate_decay="cosine")
    assert [learning_rate(cosine, i) for i in (0, 2, 3, 4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_early_stop(tiny_settings: FinetuneSettings) -> None:
    # A rate that only does harm: no evaluation improves on the first.
    settings = changed(tiny_settings, learning_rate=1.0, iterations=50, patience=2, ema_decay=0.0)
    result = tune(settings)
    assert result.best_iteration == 0
    assert result.iterations == 4
    assert result.held_out_after == result.held_out_before


@pytest.mark.parametrize(
    "values",
    [
        {"reference": "batch", "kernel": "energy"},
        {"reference": "nystrom", "landmarks": 50, "kernel": "laplace"},
        {"estimator": "biased", "micro_batch_size": 3, "kernel": "rational-quadratic"},
    ],
    ids=str,
)
def test_other_estimators_run_to_the_end(values: dict[str, Any], tiny_settings: FinetuneSettings) -> None:
    result = tune(changed(tiny_settings, iterations=2, **values))
    assert math.isfinite(result.held_out_after)
    for key, value in values.items():
        assert f"| {key} | {value} |" in (result.folder / "README.md").read_text()


def test_a_large_batch_is_evaluated_in_micro_batches(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def remember(*arguments: Any, batch: int, **others: Any) -> Tensor:
        sizes.append(batch)
        return sample_many(*arguments, batch=batch, **others)

    monkeypatch.setattr(task, "sample_many", remember)
    tune(changed(tiny_settings, iterations=1, batch_size=64, micro_batch_size=8))
    assert set(sizes) == {8}
