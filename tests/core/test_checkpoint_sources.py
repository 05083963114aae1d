"""Shards, half precision, and configs that contradict each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmd_export.checkpoint import SAFETENSORS, load_checkpoint
from mmd_export.errors import UsageError
from tests.models import save_model, weights_of

INDEX, HALF = f"{SAFETENSORS}.index.json", "diffusion_pytorch_model.fp16.safetensors"
SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in two files and an index."""
    weights = weights_of(folder)
    names = sorted(weights)
    halves = (names[::2], names[1::2])
    for file, part in zip(SHARDS, halves, strict=True):
        save_file({name: weights[name] for name in part}, folder / file)
    listed = {name: file for file, part in zip(SHARDS, halves, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    (folder / SAFETENSORS).unlink()
    return folder


def refused(model: Path, *words: str) -> None:
    with pytest.raises(UsageError) as error:
        load_checkpoint(model)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- shards


def test_shards_are_the_same_checkpoint(sharded: Path, tiny: Path) -> None:
    assert load_checkpoint(sharded).sha256 == load_checkpoint(tiny).sha256
    assert load_checkpoint(sharded).warnings == ()


def test_what_diffusers_shards(tiny: Path, tmp_path: Path) -> None:
    import diffusers

    diffusers.UNet2DModel.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(tiny / "scheduler_config.json", tmp_path)
    assert (tmp_path / INDEX).is_file()
    assert load_checkpoint(tmp_path).sha256 == load_checkpoint(tiny).sha256


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    refused(sharded, INDEX, f"the shard {SHARDS[1]} does not exist")


def test_an_index_that_does_not_match(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**index, "ghost.weight": SHARDS[0]})
    refused(sharded, "1 tensors do not match, 'ghost.weight' is in no shard")
    edit(sharded / INDEX, weight_map={name: file for name, file in index.items() if name != "conv_in.bias"})
    refused(sharded, "'conv_in.bias' is not in weight_map")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_points_elsewhere(sharded: Path, name: str) -> None:
    edit(sharded / INDEX, weight_map={"conv_in.bias": name})
    refused(sharded, f"weight_map names {name!r}; only files beside it are read")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"conv_in.bias": 3}])
def test_an_index_that_is_none(sharded: Path, weight_map: Any) -> None:
    edit(sharded / INDEX, weight_map=weight_map)
    refused(sharded, INDEX, "weight_map is missing or is not a list")


# --- half precision


def half(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in weights_of(folder).items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_variant_is_upcast(folder: Path, dtype: torch.dtype) -> None:
    weights = half(folder, dtype)
    save_file(weights, folder / HALF)
    full = load_checkpoint(folder)
    assert full.warnings == ()  # the full-precision file comes first
    (folder / SAFETENSORS).unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.warnings == (f"weights are {str(dtype).removeprefix('torch.')}; upcast to float32",)
    assert checkpoint.sha256 != full.sha256
    for name, value in weights.items():
        assert torch.equal(checkpoint.denoiser.get_parameter(f"unet.{name}"), value.float())


def test_double_precision_is_rounded_aloud(folder: Path) -> None:
    save_file(half(folder, torch.float64), folder / SAFETENSORS)
    assert load_checkpoint(folder).warnings == ("weights are float64; rounded to float32",)


# --- configs that contradict each other


def test_the_prediction_type(folder: Path) -> None:
    edit(folder / "config.json", prediction_type="v_prediction")
    assert load_checkpoint(folder).scheduler.prediction_type == "v_prediction"
    edit(folder / "config.json", prediction_type="epsilon")
    refused(folder, "the model says prediction_type 'epsilon', the scheduler 'v_prediction'", "config.json")


def test_the_number_of_timesteps(folder: Path) -> None:
    edit(folder / "config.json", num_train_timesteps=500)
    refused(folder, "the model says num_train_timesteps 500, the scheduler 1000")


def test_learned_variance(tmp_path: Path) -> None:
    """As guided-diffusion's models in diffusers' format: samplers see the mean, DDPM's own noise is not affine."""
    folder = save_model(tmp_path, {"class_name": "DDPMScheduler", "variance_type": "learned_range"}, out_channels=2)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.shape[0] == 1
    assert "the model learned its variance: the last 1 of 2 channels are left out" in checkpoint.warnings
    x = torch.randn(2, *checkpoint.shape)
    with torch.inference_mode():
        whole = diffusers.UNet2DModel.from_pretrained(folder)(x, 500).sample
        assert torch.equal(checkpoint.denoiser(x, torch.tensor([500])), whole[:, :1])
    for sampler in ("ddim", "dpmsolver"):
        assert checkpoint.plan_for(3, sampler=sampler).step_count == 3
    with pytest.raises(UsageError, match=r"variance_type 'learned_range' .* not affine; use --sampler ddim"):
        checkpoint.plan_for(3)


def test_channels_that_are_none(folder: Path) -> None:
    edit(folder / "config.json", out_channels=None)
    with pytest.raises(UsageError, match=r"out_channels|diffusers refuses it"):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["vae", "vqvae"])
def test_the_autoencoder(folder: Path, part: str) -> None:
    (folder / part).mkdir()
    config = folder / part / "config.json"
    config.write_text(json.dumps({"latent_channels": 4, "scaling_factor": 0.18215}))
    refused(folder, "the model takes 1 channels, the autoencoder makes latents of 4")
    config.write_text(json.dumps({"latent_channels": 1, "scaling_factor": 0.18215}))
    assert load_checkpoint(folder).shape == (1, 8, 8)
    edit(folder / "config.json", scaling_factor=0.13025)
    refused(folder, "the model says latent scale 0.13025, the autoencoder 0.18215")


def test_the_configs_are_the_files(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.configs == {
        "unet/config.json": (folder / "config.json").read_bytes(),
        "scheduler/scheduler_config.json": (folder / "scheduler_config.json").read_bytes(),
    }
