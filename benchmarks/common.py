"""What the benchmark scripts share: the environment, the models, the result files."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmd_export.environment import describe_environment
from mmd_export.folders import output_place

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# The architecture of google/ddpm-cifar10-32 (35.7 M parameters); its weights are random here.
CIFAR10_UNET: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6, "act_fn": "silu", "mid_block_scale_factor": 1,
}  # fmt: skip

# 16x16, 1.6 M parameters: small enough that everything but the convolutions shows.
SMALL_UNET: dict[str, Any] = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8,
}  # fmt: skip


def save_small(folder: Path, prediction_type: str = "v_prediction") -> Path:
    """A flat diffusers folder of ``SMALL_UNET`` with random weights and DDIM."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(**SMALL_UNET).save_pretrained(folder)
    DDIMScheduler(prediction_type=prediction_type).save_pretrained(folder)
    return folder


def save_cifar10(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A flat diffusers folder of the ddpm-cifar10 architecture with random weights."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(**CIFAR10_UNET).save_pretrained(folder)
    DDPMScheduler(variance_type="fixed_large", prediction_type=prediction_type).save_pretrained(folder)
    return folder


def environment() -> dict[str, Any]:
    """What the numbers depend on, without host names or paths."""
    described = describe_environment()
    described["torch_threads"] = torch.get_num_threads()
    return described


def write_result(path: Path, script: str, values: dict[str, Any]) -> None:
    """JSON with the script's name and the environment; the file is the old one or all of the new one."""
    result = {"script": script, "environment": environment(), **values}
    with output_place(path) as place:
        place.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{path.name} written")


@contextmanager
def timed(into: dict[str, Any], name: str) -> Iterator[None]:
    """Wall and CPU seconds of a block, and the process' peak memory after it, under ``into[name]``."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[name] = {
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
