"""A tiny diffusers folder, so that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmd_finetune.settings import FinetuneSettings


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UNet2DModel of 8x8 grey images with dropout, about 30 thousand weights, and a DDIM scheduler."""
    from diffusers import DDIMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=0.3,
    )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def tiny_settings(tiny_model: Path, tmp_path: Path) -> FinetuneSettings:
    """Six iterations of two steps, evaluated every two."""
    return FinetuneSettings(
        model=str(tiny_model),
        steps=2,
        out=tmp_path / "run",
        batch_size=8,
        iterations=6,
        evaluate_every=2,
        evaluate_count=16,
        learning_rate=1e-3,
        device="cpu",
    )
