"""Autoencoders that do not fit their model, their config or their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError
from tests.models import save_latent_model, weights_of, write_weights


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor is 0; latents are divided by it, so it must be positive"),
        ({"scaling_factor": -1.0}, "scaling_factor is -1; latents are divided by it"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'; a number is expected"),
        ({"latents_mean": [0.0] * 3}, r"latents_mean is \[0.0, 0.0, 0.0\]; a list of 4 numbers is expected"),
        ({"latents_std": [1.0, None, 1.0, 1.0]}, "latents_std is .*; a list of 4 numbers is expected"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, r"latents_std is \[1.0, 0.0, .*is none"),
        ({"latents_std": [1.0, "2", 1.0, 1.0]}, "latents_std is '2'; a number is expected"),
        ({"latent_channels": 8}, "the model takes 4 channels, the autoencoder makes latents of 8"),
        ({"up_block_types": ["NoBlock"]}, "diffusers refuses it"),
        ({"layers_per_block": 2}, r"weights in .*vae do not fit the config; missing: .* \(32 in all\)"),
        ({"out_channels": 1}, r"vae: decoder.conv_out.bias is \(3,\), the config says \(1,\)"),
    ],
)
def test_an_autoencoder_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_latent_model(tmp_path / "kl")
    edit(folder / "vae" / "config.json", **changes)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(folder)


def test_codes_of_another_width(tmp_path: Path) -> None:
    folder = save_latent_model(tmp_path / "vq", "VQModel", vq_embed_dim=3)
    with pytest.raises(UsageError, match="the model takes 4 channels, the autoencoder makes latents of 3"):
        load_checkpoint(folder)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "nan"])
def test_weights_are_read_strictly(tmp_path: Path, damage: str) -> None:
    folder = save_latent_model(tmp_path / "kl")
    weights = weights_of(folder / "vae")
    if damage == "missing":
        del weights["decoder.conv_in.bias"]
    elif damage == "unexpected":
        weights["decoder.extra"] = torch.zeros(1)
    else:
        weights["decoder.conv_in.bias"][0] = torch.nan
    write_weights(folder / "vae", weights)
    with pytest.raises(UsageError, match=r"vae.*: .*decoder\.(conv_in\.bias|extra)"):
        load_checkpoint(folder)
