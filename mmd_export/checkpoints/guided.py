"""``guided:FILE``: UNets of improved-diffusion and guided-diffusion, where diffusers' UNet2DModel has the same blocks.

Nichol and Dhariwal 2021, Dhariwal and Nichol 2021. Names and shapes tell all but the number of attention heads, the
noise schedule, the scale of the timesteps and the image size; those follow the file under the names of the original
commands:
``guided:model.pt?num_head_channels=64&noise_schedule=linear&image_size=64``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmd_export.checkpoints.base import Checkpoint, diffusers_configs
from mmd_export.checkpoints.diffusers_folder import TIMESTEP_SCALE, new_unet, sample_shape
from mmd_export.checkpoints.guided_options import flag, head_counts, scheduler_of, timestep_scale
from mmd_export.checkpoints.weights import (
    StateDict,
    as_float32,
    choose_entry,
    hash_weights,
    listed,
    load_strictly,
    read_entries,
)
from mmd_export.conditions import class_condition
from mmd_export.denoiser import DiffusersUNet
from mmd_export.errors import UsageError

OPTIONS = (
    "num_heads", "num_head_channels", "use_new_attention_order", "noise_schedule", "image_size", "diffusion_steps",
    "predict_xstart", "rescale_timesteps",
)  # fmt: skip
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MARKS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight", "out.2.weight")


@dataclass
class Layout:
    """What names and shapes tell.

    ``names`` and ``attentions``: modules, original -> diffusers; ``attend``: the levels with attention; ``layers``: the
    resnets of each level; ``resamplers``: what joins the levels, ``conv`` or ``resnet``.
    """

    names: dict[str, str] = field(default_factory=dict)
    attentions: dict[str, str] = field(default_factory=dict)
    channels: list[int] = field(default_factory=list)
    attend: set[int] = field(default_factory=set)
    layers: list[int] = field(default_factory=list)
    resamplers: set[str] = field(default_factory=set)


def read_guided(
    path: Path,
    *,
    ema: bool | str | None = None,
    sample_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool = False,
    scheduler: str | None = None,
    **trained: Any,
) -> Checkpoint:
    """The network in ``path``; raises UsageError that names keys or shapes that do not fit, or what is not known.

    ``scheduler``: a scheduler_config.json, instead of what is ``trained``: noise_schedule, diffusion_steps,
    predict_xstart. Not instead of rescale_timesteps, whether the network is told t * 1000 / T or t.
    """
    where = str(path)
    entries, warnings = read_entries(path)
    weights, precision = as_float32(choose_entry(entries, ema, path).weights)
    if missing := [name for name in _MARKS if name not in weights]:
        raise UsageError(
            f"weights {where} are not in the guided-diffusion layout: {listed(missing)} missing; "
            f"found {listed(sorted(weights))}"
        )
    layout = _read_layout(weights, where)
    size = sample_size or image_size
    if size is None:
        raise UsageError(f"weights {where}: nothing in them tells the image size; say ?sample_size=N")
    heads = _head_width(layout, *head_counts(num_heads, num_head_channels, where), where)
    new_order = flag("use_new_attention_order", use_new_attention_order, where)
    rescale = trained.pop("rescale_timesteps", None)
    chosen, assumed = scheduler_of(scheduler, trained, path, learned=_learned_variance(weights))
    scale = timestep_scale(rescale, chosen.num_train_timesteps, where)
    config, dropped = _config(layout, weights, size, heads, where)
    unet = new_unet(config, where)
    converted = _convert(weights, layout, unet.state_dict(), heads, new_order, where)
    load_strictly(unet, converted, where)
    if scale != 1.0:
        config[TIMESTEP_SCALE] = scale
    return Checkpoint(
        name=path.stem,
        folder=path.parent,
        denoiser=DiffusersUNet(unet.eval(), timestep_scale=scale).requires_grad_(False),
        scheduler=chosen,
        shape=sample_shape(config, where),
        sha256=hash_weights(converted, config, chosen),
        conditions=class_condition(config.get("num_class_embeds")),
        warnings=(*warnings, *precision, *dropped, *assumed),
        configs=diffusers_configs(config, chosen),
    )


def _read_layout(weights: Mapping[str, Tensor], where: str) -> Layout:
    """Walk the blocks in the order of the file: resnets of a level, then its resampler, up to the last level."""
    layout = Layout()
    layout.names.update((old, new) for old, new in _ENDS.items() if f"{old}.weight" in weights)
    level, layer = 0, 0
    for i in range(1, _count(weights, "input_blocks")):
        block = f"input_blocks.{i}"
        if not any(name.startswith(f"{block}.") for name in weights):
            raise UsageError(
                f"weights {where}: {block} has no weights (conv_resample is off); UNet2DModel resamples by "
                "convolutions or resnets only"
            )
        if kind := _resampler(weights, f"{block}.0"):
            _add(layout, f"{block}.0", kind, f"down_blocks.{level}.downsamplers.0")
            layout.layers.append(layer)
            level, layer = level + 1, 0
            continue
        _level(layout, weights, block, level, f"down_blocks.{level}", layer, where)
        layer += 1
    layout.layers.append(layer)
    for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        _add(layout, f"middle_block.{i}", part.split(".", maxsplit=1)[0], f"mid_block.{part}")
    per_level = layout.layers[0] + 1
    for i in range(_count(weights, "output_blocks")):
        goal, j = f"up_blocks.{i // per_level}", i % per_level
        last = _level(layout, weights, f"output_blocks.{i}", level - i // per_level, goal, j, where)
        if kind := _resampler(weights, last):
            _add(layout, last, kind, f"{goal}.upsamplers.0")
    if len(set(layout.layers)) > 1:
        raise UsageError(f"weights {where}: {layout.layers} blocks by level; UNet2DModel has as many at each")
    if len(layout.resamplers) > 1:
        raise UsageError(f"weights {where}: levels are joined by {' and '.join(sorted(layout.resamplers))}, not by one")
    return layout


def _count(weights: Mapping[str, Tensor], part: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(rf"{part}\.(\d+)\.", name))}
    return max(found, default=-1) + 1


def _resampler(weights: Mapping[str, Tensor], module: str) -> str:
    """``conv``, ``resnet``, or nothing. A resnet that resamples stands alone where a level would begin or end."""
    if f"{module}.op.weight" in weights or f"{module}.conv.weight" in weights:
        return "conv"
    block, place = module.rsplit(".", 1)
    if f"{module}.in_layers.2.weight" not in weights:
        return ""
    if block.startswith("output_blocks"):
        return "resnet" if place != "0" else ""
    return "resnet" if _is_down(weights, block) else ""


def _is_down(weights: Mapping[str, Tensor], block: str) -> bool:
    """Whether an input block that holds one resnet is a resampler: it comes after as many resnets as the level has.

    The output side tells how many: every level has one resnet more there, and ends with a resampler.
    """
    first = next(
        (i for i in range(_count(weights, "output_blocks")) if _ends_level(weights, f"output_blocks.{i}")), None
    )
    return first is not None and int(block.rsplit(".", 1)[1]) % (first + 1) == 0


def _ends_level(weights: Mapping[str, Tensor], block: str) -> bool:
    return any(
        f"{block}.{j}.{part}.weight" in weights for j in (1, 2) for part in ("conv", "in_layers.2")
    )  # fmt: skip


def _level(layout: Layout, weights: Mapping[str, Tensor], block: str, level: int, goal: str, j: int, where: str) -> str:
    """One resnet and its attention, if any; returns where a resampler would stand."""
    _add(layout, f"{block}.0", "resnets", f"{goal}.resnets.{j}")
    if block.startswith("input_blocks") and j == 0:
        weight = weights.get(f"{block}.0.in_layers.2.weight")
        if weight is None:
            raise UsageError(f"weights {where} are not in the guided-diffusion layout: {block}.0 is no resnet")
        layout.channels.append(weight.shape[0])
    if f"{block}.1.qkv.weight" not in weights:
        return f"{block}.1"
    _add(layout, f"{block}.1", "attentions", f"{goal}.attentions.{j}")
    layout.attend.add(level)
    return f"{block}.2"


def _add(layout: Layout, old: str, kind: str, new: str) -> None:
    """Register the parts of one module."""
    if kind == "attentions":
        layout.attentions[old] = new
    elif kind == "conv":
        layout.resamplers.add("conv")
        layout.names |= {f"{old}.op": f"{new}.conv", f"{old}.conv": f"{new}.conv"}
    else:
        if kind == "resnet":
            layout.resamplers.add("resnet")
        layout.names |= {f"{old}.{part}": f"{new}.{goal}" for part, goal in _RESNET.items()}


def _learned_variance(weights: Mapping[str, Tensor]) -> bool:
    """Whether the network gives twice the channels that it takes."""
    return weights["out.2.weight"].shape[0] == 2 * weights["input_blocks.0.0.weight"].shape[1]


def _head_width(layout: Layout, num_heads: int | None, num_head_channels: int | None, where: str) -> int | None:
    """Channels of one attention head, None for one head whatever the width; UNet2DModel has one number for all."""
    widths = {layout.channels[level] for level in layout.attend} | {layout.channels[-1]}
    if num_heads is None and num_head_channels is None:
        raise UsageError(
            f"weights {where}: nothing in them tells the attention heads; say ?num_heads=N or ?num_head_channels=N"
        )
    if num_head_channels is not None:
        if num_head_channels < 1 or any(width % num_head_channels for width in widths):
            raise UsageError(f"weights {where}: num_head_channels is {num_head_channels}, the widths {sorted(widths)}")
        return num_head_channels
    assert num_heads is not None
    if num_heads == 1:
        return None
    if num_heads < 1 or len(widths) > 1 or widths.copy().pop() % num_heads:
        raise UsageError(
            f"weights {where}: num_heads is {num_heads} with attention at the widths {sorted(widths)}; UNet2DModel has "
            "heads of one width only, or one head"
        )
    return widths.pop() // num_heads


def _config(
    layout: Layout, weights: Mapping[str, Tensor], size: int | tuple[int, int], heads: int | None, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The UNet2DModel that computes the same, and what the user should hear of it."""
    given, taken = weights["out.2.weight"].shape[0], weights["input_blocks.0.0.weight"].shape[1]
    base = weights["time_embed.0.weight"].shape[1]
    if layout.channels[0] != base:
        raise UsageError(
            f"weights {where}: the first level has {layout.channels[0]} channels, the time embedding {base}; "
            "UNet2DModel has the same number for both"
        )
    dropped: tuple[str, ...] = ()
    if _learned_variance(weights):
        dropped = (
            f"learned variance: output channels {taken} to {given - 1} are left out, the samplers do not use it",
        )
        given = taken
    unit = 2 ** (len(layout.channels) - 1)
    if any(side < 1 or side % unit for side in ((size, size) if isinstance(size, int) else size)):
        raise UsageError(
            f"weights {where}: sample_size is {size}; {len(layout.channels)} levels need multiples of {unit}"
        )
    kind = "resnet" if "resnet" in layout.resamplers else "conv"
    plain = "ResnetDownsampleBlock2D" if kind == "resnet" else "DownBlock2D"
    down = ["AttnDownBlock2D" if level in layout.attend else plain for level in range(len(layout.channels))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    wide = weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * layout.channels[-1]
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": size if isinstance(size, int) else list(size),
        "in_channels": taken,
        "out_channels": given,
        "block_out_channels": layout.channels,
        "layers_per_block": layout.layers[0],
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": heads,
        "resnet_time_scale_shift": "scale_shift" if wide else "default",
        "attn_norm_num_groups": 32,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    if "label_emb.weight" in weights:
        config["num_class_embeds"] = weights["label_emb.weight"].shape[0]
    return config, dropped


def _convert(
    weights: Mapping[str, Tensor],
    layout: Layout,
    goal: Mapping[str, Tensor],
    heads: int | None,
    new_order: bool,
    where: str,
) -> StateDict:
    """Every tensor under its name in ``goal``; raises UsageError with the keys that have none."""
    converted: StateDict = {}
    unknown: list[str] = []
    for old, tensor in weights.items():
        module, _, kind = old.rpartition(".")
        owner, _, part = module.rpartition(".")
        if owner in layout.attentions and part in ("norm", "qkv", "proj_out"):
            converted.update(_attention(layout.attentions[owner], part, kind, tensor, heads, new_order))
        elif module in layout.names:
            new = f"{layout.names[module]}.{kind}"
            keep = goal[new].shape[0] if module == "out.2" and new in goal else tensor.shape[0]
            converted[new] = tensor[:keep]
        else:
            unknown.append(old)
    if unknown := sorted(unknown):
        raise UsageError(f"weights {where} are not in the guided-diffusion layout: no place for {listed(unknown)}")
    return converted


def _attention(
    new: str, part: str, kind: str, tensor: Tensor, heads: int | None, new_order: bool
) -> Iterator[tuple[str, Tensor]]:
    """The norm, the output projection, or q, k and v out of one 1x1 convolution.

    Its rows are (heads, 3, width of a head), or (3, heads, width of a head) in the new order.
    """
    matrix = tensor[..., 0] if tensor.dim() == 3 else tensor
    if part == "norm":
        yield f"{new}.group_norm.{kind}", tensor
    elif part == "proj_out":
        yield f"{new}.to_out.0.{kind}", matrix
    else:
        width = heads or matrix.shape[0] // 3
        rows = matrix.reshape(3, -1, *matrix.shape[1:]) if new_order else _legacy(matrix, width)
        yield from zip((f"{new}.to_{name}.{kind}" for name in "qkv"), rows, strict=True)


def _legacy(matrix: Tensor, width: int) -> Tensor:
    """(heads, 3, width, ...) -> (3, heads * width, ...)."""
    by_head = matrix.reshape(-1, 3, width, *matrix.shape[1:])
    return torch.stack([by_head[:, i].reshape(-1, *matrix.shape[1:]) for i in range(3)])
