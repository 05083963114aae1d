"""Tiny diffusers folders for the tests, and cheap stand-ins for a network.

The networks are random, so they predict v: a random epsilon network amplifies some 670 times, then clips, and saturated
pixels hide faults.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmd_export.checkpoint import SAFETENSORS, Checkpoint, load_checkpoint
from mmd_export.plan import StepPlan

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8,),  # one level: a build takes as long as there are nodes
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "add_attention": False,
}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
ATTENTION: dict[str, Any] = {
    **TWO_LEVELS,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "add_attention": True,
}
TWO_CHANNELS: dict[str, Any] = {"in_channels": 2, "out_channels": 2, "sample_size": (8, 12)}
LABELS: dict[str, Any] = {"num_class_embeds": 5}


def new_unet(seed: int = 0, **changes: Any) -> Any:
    """A random UNet2DModel in evaluation mode."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(**{**TINY, **changes})
        for parameter in list(unet.parameters()):  # zero biases and unit norms would hide swapped tensors
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def save_model(folder: Path, scheduler: dict[str, Any] | None = None, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random model and its scheduler config as a flat diffusers folder."""
    import diffusers

    settings = {"class_name": "DDIMScheduler", "prediction_type": "v_prediction", **(scheduler or {})}
    new_unet(seed, **changes).save_pretrained(folder)
    getattr(diffusers, settings.pop("class_name"))(**settings).save_pretrained(folder)
    return folder


AUTOENCODERS: dict[str, dict[str, Any]] = {  # latents (4, 8, 8) to images (3, 16, 16), all with attention but the tiny
    "AutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "VQModel": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "vq_embed_dim": 4,
        "scaling_factor": 1.5,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "attention_head_dim": 8,
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
}
LATENT: dict[str, Any] = {"in_channels": 4, "out_channels": 4}


def save_latent_model(folder: Path, kind: str = "AutoencoderKL", *, seed: int = 0, **changes: Any) -> Path:
    """Save a random latent model as a diffusers pipeline folder: ``unet/``, ``scheduler/``, ``vae/``."""
    import diffusers

    new_unet(seed, **LATENT).save_pretrained(folder / "unet")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = getattr(diffusers, kind)(**{**AUTOENCODERS[kind], **changes})
        for parameter in list(autoencoder.parameters()):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        if kind == "VQModel":  # codes as far apart as latents are, not 1 / 16
            autoencoder.quantize.embedding.weight.data.normal_()
    autoencoder.save_pretrained(folder / "vae")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / SAFETENSORS)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Replace the tensors of a saved model."""
    from safetensors.torch import save_file

    save_file(weights, folder / SAFETENSORS)


class Bent(nn.Module):
    """A cheap nonlinear denoiser, different at every timestep and for every class."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self.timesteps = plan.timesteps

    def forward(self, x: Tensor, k: int, class_labels: Tensor | None = None) -> Tensor:
        y = bent(x, self.timesteps[k])
        return y if class_labels is None else y + 0.1 * class_labels.reshape(-1, 1, 1, 1)


def bent(x: Tensor, timestep: float) -> Tensor:
    """The formula of ``Bent``."""
    return torch.tanh(0.7 * x + 0.3 * math.sin(timestep)) + 0.1 * x


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One channel, one level, no attention, v prediction, DDIM."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels, two levels, attention, oblong images."""
    return save_model(tmp_path_factory.mktemp("models") / "attention", seed=1, **ATTENTION, **TWO_CHANNELS)


@pytest.fixture(scope="session")
def tiny_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class-conditional, two levels, DDPM."""
    folder = tmp_path_factory.mktemp("models") / "labels"
    return save_model(folder, {"class_name": "DDPMScheduler"}, seed=2, **TWO_LEVELS, **LABELS)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Path) -> Checkpoint:
    """``tiny``, loaded."""
    return load_checkpoint(tiny)
