"""Tiny random networks of every class that can be read, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
_ONE_LEVEL: dict[str, Any] = {
    **_UNET,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
_TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
}
# name -> (class, config, scheduler)
NETWORKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("UNet2DConditionModel", _UNET, "ddim"),
    "text-labels": ("UNet2DConditionModel", {**_ONE_LEVEL, "num_class_embeds": 5}, "ddim"),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_ONE_LEVEL,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
        },
        "ddim",
    ),
    "lcm": ("UNet2DConditionModel", {**_ONE_LEVEL, "time_cond_proj_dim": 16}, "lcm"),
    "dit": (
        "DiTTransformer2DModel",
        {**_TRANSFORMER, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 7},
        "ddim",
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_TRANSFORMER, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": 10,
         "use_additional_conditions": True},
        "ddim",
    ),
    "pixart-plain": (
        "PixArtTransformer2DModel",
        {**_TRANSFORMER, "out_channels": 4, "cross_attention_dim": 24, "caption_channels": 10,
         "use_additional_conditions": False},
        "ddim",
    ),
    "sana": (
        "SanaTransformer2DModel",
        {**_TRANSFORMER, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
         "cross_attention_dim": 24, "caption_channels": 10, "timestep_scale": 0.5},
        "flow",
    ),
    "sana-sprint": (
        "SanaTransformer2DModel",
        {**_TRANSFORMER, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
         "cross_attention_dim": 24, "caption_channels": 10, "guidance_embeds": True, "guidance_embeds_scale": 0.2,
         "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.5},
        "scm",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        # two, as the last layer has no output for the text
        {**_TRANSFORMER, "num_layers": 2, "out_channels": 4, "joint_attention_dim": 10, "caption_projection_dim": 24,
         "pooled_projection_dim": 6, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
         "dual_attention_layers": (0,)},
        "flow",
    ),
}  # fmt: skip


def new_network(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random network in evaluation mode, no weight zero or one."""
    import diffusers

    class_name, config, _ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(diffusers, class_name)(**{**config, **changes})
        for parameter in list(network.parameters()):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def new_scheduler(kind: str) -> Any:
    """One that goes with a random network: v or flow prediction, so that nothing saturates."""
    import diffusers

    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "scm":
        return diffusers.SCMScheduler()
    if kind == "lcm":
        return diffusers.LCMScheduler(prediction_type="v_prediction")
    return diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)


def save_network(folder: Path, name: str, *, seed: int = 0, scheduler: str | None = None, **changes: Any) -> Path:
    """Save a pipeline's ``unet/`` or ``transformer/`` and its scheduler."""
    class_name, _, kind = NETWORKS[name]
    part = "unet" if class_name.startswith("UNet") else "transformer"
    new_network(name, seed, **changes).save_pretrained(folder / part)
    new_scheduler(scheduler or kind).save_pretrained(folder / "scheduler")
    return folder
