"""What is tuned: all weights, adapters, norms and biases, nothing but the plan; each resumes to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError
from mmd_finetune.adapters import plain_weights
from mmd_finetune.loop import Report, tune
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.task import REPORT_SEED, prepare
from mmd_finetune.trainable import Trainable, clip_gradients
from tests.finetune.runs import WEIGHTS, changed, distance_of

KINDS: list[dict[str, Any]] = [
    {},
    {"tune": "lora", "lora_rank": 2, "learn": "coefficients"},
    {"tune": "norm-bias"},
    {"tune": "none", "learn": "plan", "plan_learning_rate": 1e-2},
    {"precision": "int8", "calibration": 1, "learn": "plan"},
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def started(settings: FinetuneSettings) -> Trainable:
    return prepare(settings).trainable()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_resumes_to_the_same_bits(
    kind: dict[str, Any], tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    def stop(report: Report) -> None:
        if report.iteration == 3:
            raise KeyboardInterrupt

    settings = changed(tiny_settings, learning_rate=5e-3, **kind)
    with pytest.raises(KeyboardInterrupt):
        tune(settings, observer=stop)
    assert (settings.out / "state.safetensors").exists()
    torch.manual_seed(123)  # nothing depends on the global generator
    tune(settings, resume=True)
    whole = tune(changed(settings, out=tmp_path / "whole")).folder
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(settings.out).items())
    for name in ("plan.json", "after.png", "quantisation.json"):
        assert (settings.out / name).exists() == (whole / name).exists()
        if (whole / name).exists():
            assert (settings.out / name).read_bytes() == (whole / name).read_bytes()


def test_lora_leaves_a_plain_diffusers_folder(tiny_settings: FinetuneSettings, tiny_model: Path) -> None:
    settings = changed(tiny_settings, tune="lora", lora_rank=2, learning_rate=3e-3, iterations=12, ema_decay=0.5)
    result = tune(settings)
    old, new = weights(tiny_model), weights(result.folder)
    assert old.keys() == new.keys()
    differing = [name for name in old if not torch.equal(old[name], new[name])]
    assert "conv_in.weight" in differing
    assert all(name.endswith(".weight") and "norm" not in name for name in differing)
    rank = torch.linalg.matrix_rank((new["conv_out.weight"] - old["conv_out.weight"]).flatten(1), rtol=1e-3)
    assert int(torch.linalg.matrix_rank((new["conv_in.weight"] - old["conv_in.weight"]).flatten(1), rtol=1e-3)) <= 2
    assert int(rank) <= 2
    work = prepare(tiny_settings)
    shipped = load_checkpoint(result.folder).denoiser
    assert distance_of(work, work.samples(shipped, REPORT_SEED)) == result.held_out_after


def test_adapters_start_as_the_model_itself(tiny_settings: FinetuneSettings) -> None:
    settings = changed(tiny_settings, tune="lora", lora_rank=2, lora_alpha=4)
    work, tuned = prepare(settings), started(settings)
    inputs = work.noise_of(0)
    with torch.no_grad():
        assert torch.equal(tuned.sampler()(**inputs), work.sampler(work.base.denoiser)(**inputs))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        apart, merged = tuned.sampler()(**inputs), tuned.shipped(work.base).sampler()(**inputs)
    assert float((apart - work.sampler(work.base.denoiser)(**inputs)).abs().max()) > 1e-3
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-5)
    assert plain_weights(tuned.network).keys() == work.base.denoiser.state_dict().keys()


def test_only_what_was_named_is_tuned(tiny_settings: FinetuneSettings) -> None:
    named = started(changed(tiny_settings, tune="lora", lora_targets=("conv1", "time_emb_proj")))
    tuned = [name for name, parameter in named.named_parameters() if parameter.requires_grad]
    assert tuned
    assert all("lora_" in name and (".conv1." in name or ".time_emb_proj." in name) for name in tuned)
    norms = started(changed(tiny_settings, tune="norm-bias"))
    for name, parameter in norms.named_parameters():
        assert parameter.requires_grad == (name.endswith(".bias") or "norm" in name), name


def test_norm_bias_changes_nothing_else(tiny_settings: FinetuneSettings, tiny_model: Path) -> None:
    result = tune(changed(tiny_settings, tune="norm-bias", learning_rate=1e-2))
    old, new = weights(tiny_model), weights(result.folder)
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing
    assert all(name.endswith(".bias") or "norm" in name for name in differing)


def test_the_plan_alone_leaves_the_weights(tiny_settings: FinetuneSettings, tiny_model: Path) -> None:
    settings = changed(tiny_settings, tune="none", learn="plan", plan_learning_rate=2e-2, iterations=20)
    result = tune(settings)
    old, new = weights(tiny_model), weights(result.folder)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert result.held_out_after < result.held_out_before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tune": "none"}, "--tune none with --learn weights leaves nothing to tune"),
        ({"lora_rank": 4}, "--lora-rank is 4, but --tune is all"),
        ({"lora_targets": "to_q"}, "--lora-targets is to_q, but --tune is all"),
        ({"tune": "bias"}, "tune is 'bias'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"calibration": 8}, "--calibration is 8, but --precision fp32 has no ranges to set"),
        ({"precision": "w8", "calibration": 8}, "--calibration is 8, but --precision w8 has no ranges to set"),
        ({"plan_learning_rate": 0.0}, "--plan-lr is 0"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_settings({"model": "digits", "steps": 5, "out": "run", **values})


def test_a_target_that_is_not_there_is_said(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match=r"--lora-targets to_x: no layer's name ends so; layers end in .*conv1"):
        tune(changed(tiny_settings, tune="lora", lora_targets=("conv1", "to_x")))


def test_gradients_are_clipped_group_by_group() -> None:
    one, two = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    one.grad, two.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5], dtype=torch.float64)
    norm = clip_gradients([{"params": [one]}, {"params": [two]}], 1.0)
    assert norm == pytest.approx((25.0 + 0.25) ** 0.5)
    torch.testing.assert_close(one.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)
    torch.testing.assert_close(two.grad, torch.tensor([0.5], dtype=torch.float64))


def test_resume_in_another_way_of_tuning_is_refused(tiny_settings: FinetuneSettings) -> None:
    def stop(_: Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings, observer=stop)
    with pytest.raises(UsageError, match="--tune was 'all', is now 'norm-bias'"):
        tune(changed(tiny_settings, tune="norm-bias"), resume=True)


def test_plain_tuning_needs_neither_peft_nor_onnx() -> None:
    code = "import sys, mmd_finetune.loop; print(sorted({'peft', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
