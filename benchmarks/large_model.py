"""A model above protobuf's 2 GiB: build, parity, size, time, peak memory -> benchmarks/results/large_model.json.

A UNet2DModel of random weights, wide at a tiny resolution. It takes some 3 GB of disk beside ``--scratch``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, timed, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle

STEPS = 2
LARGE_UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (512, 1024, 1536), "norm_num_groups": 32, "attention_head_dim": 64, "add_attention": False,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def save_large(folder: Path) -> int:
    """A flat diffusers folder with random weights; v prediction, since a random epsilon network saturates."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**LARGE_UNET)
    unet.save_pretrained(folder, max_shard_size="10GB")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in unet.parameters()))


def measured_build(model: Path, out: Path, verify: bool) -> dict[str, Any]:
    """Seconds and peak memory of one build, with the facts of its bundle."""
    result: dict[str, Any] = {}
    with timed(result, "build"):
        bundle = build(BuildOptions(str(model), "onnx", out, steps=STEPS, overwrite=True, verify=verify), print)
    files = {entry.path: entry.size for entry in bundle.manifest.files}
    return result | {
        "files": files, "graph": bundle.manifest.graph.model_dump(mode="json"), "parity": bundle.manifest.parity,
    }  # fmt: skip


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for the model and the bundle; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "large_model.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "bundle"
        parameters = in_a_child(save_large, model)
        built = in_a_child(measured_build, model, out, False)
        result = in_a_child(measured_build, model, out, True)
        with timed(result, "opening_and_hashing"):
            Bundle.open(out)
    result |= {
        "steps": STEPS,
        "config": LARGE_UNET,
        "parameters": parameters,
        "build_without_verifying": built["build"],
    }
    result["worst_error_rounded_up"] = max(result["parity"].values())
    write_result(arguments.out, "benchmarks/large_model.py", result)


if __name__ == "__main__":
    main()
