"""The architecture of google/ddpm-cifar10-32, 35.7 M random weights: the same commands, the same tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from tests.models import save_model

ARCHITECTURE: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "add_attention": True,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
}
SCHEDULER: dict[str, Any] = {
    "class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": True,
    "variance_type": "fixed_large",
    "prediction_type": "epsilon",
}
STEPS = 5


@pytest.mark.slow
def test_it_builds_and_verifies(tmp_path: Path) -> None:
    model = save_model(tmp_path / "ddpm-cifar10-32", SCHEDULER, **ARCHITECTURE)
    options = BuildOptions(model=str(model), target="onnx", out=tmp_path / "out", steps=STEPS, sampler="ddim")
    bundle = build(options)
    weights = (model / "diffusion_pytorch_model.safetensors").stat().st_size
    assert weights > 140e6
    graph = Bundle.open(tmp_path / "out").manifest.graph
    assert "Resize" not in graph.op_counts
    assert bundle.artefact_path.stat().st_size <= 1.05 * min(weights, graph.unique_weight_bytes) + 2048 * graph.nodes
    assert bundle.manifest.parity is not None
    assert len(bundle.manifest.parity) == 1 + 2 * STEPS
    assert max(bundle.manifest.parity.values()) <= bundle.manifest.tolerance.atol == 1e-4
