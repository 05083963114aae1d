"""Guidance as one doubled batch or as two calls: latency of the two ONNX graphs, interleaved; a few minutes.

Random networks that predict v, one thread. What is faster is what ``--guidance-form auto`` means:
``mmd_export.checkpoints.classifier_free.FASTER``.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.commands.bench import bench
from mmd_export.commands.candidates import BenchOptions
from mmd_export.network_options import NetworkOptions

STEPS, SCALE = 4, 4.0
ROUNDS = {"tiny": 60, "small": 60, "medium": 9}
BATCHES = (1, 4)
FORMS = ("doubled", "two-calls")
# UNet2DConditionModel: 8x8 latents, and 16x16 ones with 1.6 M and 25 M parameters.
_COMMON: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "tiny": {**_COMMON, "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8,
             "cross_attention_dim": 32},
    "small": {**_COMMON, "sample_size": 16, "block_out_channels": (48, 88), "norm_num_groups": 8,
              "cross_attention_dim": 96},
    "medium": {**_COMMON, "sample_size": 16, "block_out_channels": (192, 352), "norm_num_groups": 32,
               "cross_attention_dim": 384},
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in NETWORKS.items():
            model = Path(temporary) / name
            parameters = save(model, config)
            for batch in BATCHES:
                facts = {"model": name, "parameters": parameters, "batch": batch, "rounds": ROUNDS[name]}
                rows.append({**facts, **measured(model, batch)})
                print(rows[-1], flush=True)
    settings = {"steps": STEPS, "guidance_scale": SCALE, "threads": 1}
    write_result(RESULTS / "guidance.json", "benchmarks.guidance", {**settings, "rows": rows})


def save(folder: Path, config: dict[str, Any]) -> int:
    """A random network with its scheduler; the number of its parameters."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(**config)
    network.save_pretrained(folder / "unet")
    DDIMScheduler(prediction_type="v_prediction", clip_sample=False).save_pretrained(folder / "scheduler")
    return sum(parameter.numel() for parameter in network.parameters())


def measured(model: Path, batch: int) -> dict[str, Any]:
    """Medians, and the time of the doubled batch over that of two calls."""
    bundles = []
    for form in FORMS:
        out = model.parent / f"{model.name}-{batch}-{form}"
        network = NetworkOptions(guidance_scale=SCALE, guidance_form=form)
        build(BuildOptions(str(model), "onnx", out, steps=STEPS, batch=str(batch), network=network, verify=False))
        bundles.append(out)
    report = bench(BenchOptions(tuple(bundles), rounds=ROUNDS[model.name], threads=1))
    doubled, two_calls = report.candidates
    ratio = report.latency.ratio(doubled, two_calls)
    return {
        "doubled_ms": round(1e3 * report.latency.summary(doubled).median, 3),
        "two_calls_ms": round(1e3 * report.latency.summary(two_calls).median, 3),
        "doubled_over_two_calls": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
    }


if __name__ == "__main__":
    main()
