"""``ddim:FILE``: the U-Net layout of the original DDIM and DDPM code, as a diffusers UNet2DModel.

The layout of ermongroup/ddim (``models/diffusion.py``) and of pesser/pytorch_diffusion, whose conversions of the
TensorFlow weights of Ho et al. 2020 (CIFAR-10, LSUN) MMD-DDM starts from. The file holds no configuration: all of it is
read from names and shapes. A weight without a place in the UNet2DModel, or a place without a weight, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmd_export.checkpoints.agreement import require_channels
from mmd_export.checkpoints.base import Checkpoint, diffusers_configs
from mmd_export.checkpoints.diffusers_folder import new_unet
from mmd_export.checkpoints.weights import (
    StateDict,
    as_float32,
    choose_entry,
    hash_weights,
    listed,
    load_strictly,
    read_entries,
)
from mmd_export.denoiser import DiffusersUNet
from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig

GROUPS = 32
# (channel multipliers, levels with attention) -> width of the published models: CIFAR-10, CelebA, LSUN.
KNOWN: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {
    ((1, 2, 2, 2), (1,)): 32,
    ((1, 2, 2, 2, 4), (2,)): 64,
    ((1, 1, 2, 2, 4, 4), (4,)): 256,
}
ATTENTION_WIDTH = 16  # of all published models; Ho et al. 2020, appendix B
_RESNET = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
_SHORTCUTS = ("nin_shortcut", "conv_shortcut")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_MARKS = ("temb.dense.0.weight", "conv_in.weight", "conv_out.weight", "down.0.block.0.conv1.weight")


@dataclass(frozen=True)
class Layout:
    """What names and shapes tell. ``channels`` by level, finest first; ``attention`` the levels that attend."""

    base: int
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]

    @property
    def multipliers(self) -> tuple[int, ...]:
        return tuple(width // self.base for width in self.channels)

    def modules(self) -> Iterator[tuple[str, str]]:
        """(original name, UNet2DModel's name) of every module with weights; shortcuts wherever one could be."""
        yield from _ENDS.items()
        last = len(self.channels) - 1
        for level in range(last + 1):
            for side, goal, count, resample in (
                ("down", f"down_blocks.{level}", self.layers, "downsample"),
                ("up", f"up_blocks.{last - level}", self.layers + 1, "upsample"),
            ):
                for j in range(count):
                    yield from _resnet(f"{side}.{level}.block.{j}", f"{goal}.resnets.{j}")
                    if level in self.attention:
                        yield from _attention(f"{side}.{level}.attn.{j}", f"{goal}.attentions.{j}")
                if level != (last if side == "down" else 0):
                    yield f"{side}.{level}.{resample}.conv", f"{goal}.{resample}rs.0.conv"
        yield from _resnet("mid.block_1", "mid_block.resnets.0")
        yield from _attention("mid.attn_1", "mid_block.attentions.0")
        yield from _resnet("mid.block_2", "mid_block.resnets.1")

    def config(self, size: int | tuple[int, int]) -> dict[str, Any]:
        """The UNet2DModel that computes the same; the conventions that differ from its defaults are all stated.

        Sine before cosine with half - 1 frequencies, stride-2 convolutions padded right and below only, one head,
        epsilon 1e-6 in every norm.
        """
        down = ["AttnDownBlock2D" if i in self.attention else "DownBlock2D" for i in range(len(self.channels))]
        up = [kind.replace("Down", "Up") for kind in reversed(down)]
        return {
            "_class_name": "UNet2DModel",
            "sample_size": size if isinstance(size, int) else list(size),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.layers,
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
            "norm_num_groups": GROUPS,
            "norm_eps": 1e-6,
        }


def _resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{part}", f"{new}.{goal}") for part, goal in _RESNET.items())
    yield from ((f"{old}.{part}", f"{new}.conv_shortcut") for part in _SHORTCUTS)


def _attention(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{part}", f"{new}.{goal}") for part, goal in _ATTENTION.items())


def read_ddim(
    path: Path,
    *,
    ema: bool | str | None = None,
    sample_size: int | tuple[int, int] | None = None,
    scheduler: str | None = None,
) -> Checkpoint:
    """The network in ``path``; raises UsageError that names the keys or shapes that do not fit.

    ``scheduler``: a scheduler_config.json instead of what the published models were trained with.
    """
    entries, warnings = read_entries(path)
    entry = choose_entry(entries, ema, path)
    if len(entries) > 1:
        names = ", ".join(repr(other.name) for other in entries)
        kind = "the average" if entry.is_ema else "plain weights"
        warnings += (f"{path.name} has the entries {names}; {entry.name!r} is taken: {kind}",)
    layout = read_layout(entry.weights, str(path))
    size, guessed = _size(layout, sample_size, str(path))
    config = layout.config(size)
    require_channels(config, str(path))
    original, precision = as_float32(entry.weights)
    unet = new_unet(config, str(path))
    weights = convert(original, layout, unet.state_dict(), str(path))
    load_strictly(unet, weights, str(path))
    chosen, assumed = _scheduler(scheduler, layout, path)
    height, width = (size, size) if isinstance(size, int) else size
    return Checkpoint(
        name=path.stem,
        folder=path.parent,
        denoiser=DiffusersUNet(unet.eval()).requires_grad_(False),
        scheduler=chosen,
        shape=(layout.in_channels, height, width),
        sha256=hash_weights(weights, config, chosen),
        warnings=(*warnings, *precision, *guessed, *assumed),
        configs=diffusers_configs(config, chosen),
    )


def _scheduler(file: str | None, layout: Layout, path: Path) -> tuple[SchedulerConfig, tuple[str, ...]]:
    """Of a scheduler_config.json, or what the published models were trained with, said aloud."""
    if file is not None:
        return SchedulerConfig.from_file(Path(file)), ()
    scheduler = scheduler_of(layout)
    assumed = (
        f"{path.name} holds no scheduler; taken as trained by DDPM: {scheduler.beta_schedule} betas "
        f"{scheduler.beta_start:g} to {scheduler.beta_end:g}, {scheduler.num_train_timesteps} timesteps, "
        "epsilon prediction, and sampled as by DDIM, without clamping the clean guess"
    )
    return scheduler, (assumed,)


def scheduler_of(layout: Layout) -> SchedulerConfig:
    """Linear betas 1e-4 to 0.02, T = 1000, epsilon (Ho et al. 2020, section 4); the variance as each was published."""
    large = KNOWN.get((layout.multipliers, layout.attention)) != 256
    return SchedulerConfig(clip_sample=False, variance_type="fixed_large" if large else "fixed_small")


def read_layout(weights: Mapping[str, Tensor], where: str) -> Layout:
    """The configuration behind names and shapes; raises UsageError if they are another architecture's."""
    if missing := [name for name in _MARKS if name not in weights]:
        raise UsageError(
            f"weights {where} are not in the DDIM layout: {listed(missing)} missing; found {listed(sorted(weights))}"
        )
    levels = _count(weights, r"down\.(\d+)\.")
    layers = {level: _count(weights, rf"down\.{level}\.block\.(\d+)\.") for level in range(levels)}
    if min(layers.values()) == 0 or len(set(layers.values())) > 1:
        raise UsageError(f"weights {where}: {list(layers.values())} blocks by level; UNet2DModel has as many at each")
    base = _size_of(weights, "temb.dense.0.weight", 1, where)
    channels = tuple(_size_of(weights, f"down.{level}.block.0.conv1.weight", 0, where) for level in range(levels))
    layout = Layout(
        base=base,
        in_channels=_size_of(weights, "conv_in.weight", 1, where),
        out_channels=_size_of(weights, "conv_out.weight", 0, where),
        channels=channels,
        layers=layers[0],
        attention=tuple(level for level in range(levels) if f"down.{level}.attn.0.q.weight" in weights),
    )
    if channels[0] != base:
        raise UsageError(
            f"weights {where}: the first level has {channels[0]} channels, the time embedding {base}; UNet2DModel has "
            "the same number for both"
        )
    if odd := [width for width in channels if width % GROUPS]:
        raise UsageError(f"weights {where}: a level has {odd[0]} channels, not a multiple of its {GROUPS} norm groups")
    if levels > 1 and "down.0.downsample.conv.weight" not in weights:
        raise UsageError(
            f"weights {where}: down.0.downsample.conv.weight is missing (resamp_with_conv is off); UNet2DModel "
            "resamples by convolutions only"
        )
    return layout


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def _size_of(weights: Mapping[str, Tensor], name: str, axis: int, where: str) -> int:
    if name not in weights or weights[name].dim() <= axis:
        raise UsageError(f"weights {where} are not in the DDIM layout: {name} is missing or has too few dimensions")
    return weights[name].shape[axis]


def convert(
    weights: Mapping[str, Tensor], layout: Layout, goal: Mapping[str, Tensor], where: str
) -> StateDict:  # fmt: skip
    """Every tensor of ``weights`` under its name and shape in ``goal``, and every place of ``goal`` filled."""
    names = {
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in layout.modules()
        for kind in ("weight", "bias")
        if f"{new}.{kind}" in goal
    }
    if unknown := sorted(set(weights) - set(names)):
        raise UsageError(f"weights {where} are not in the DDIM layout: no place for {listed(unknown)}")
    converted: StateDict = {}
    for old, tensor in weights.items():
        new = names[old]
        if new in converted:
            raise UsageError(f"weights {where}: {old} and another tensor stand for the same {new}")
        converted[new] = _fitted(tensor, goal[new], f"weights {where}: {old}")
    if missing := sorted(old for old, new in names.items() if new not in converted and "conv_shortcut" not in old):
        raise UsageError(f"weights {where} are not in the DDIM layout: {listed(missing)} missing")
    return converted


def _fitted(tensor: Tensor, goal: Tensor, what: str) -> Tensor:
    """A 1x1 convolution as the matrix of a linear layer, all else as it is; raises UsageError with both shapes."""
    pointwise = tensor.dim() == goal.dim() + 2 and tuple(tensor.shape[-2:]) == (1, 1)
    fitted = tensor[..., 0, 0] if pointwise else tensor
    if fitted.shape != goal.shape:
        raise UsageError(f"{what} is {tuple(tensor.shape)}, UNet2DModel takes {tuple(goal.shape)}")
    return fitted.contiguous()


def _size(
    layout: Layout, given: int | tuple[int, int] | None, where: str
) -> tuple[int | tuple[int, int], tuple[str, ...]]:
    """Height and width of the images, and a warning where they are guessed."""
    unit = 2 ** (len(layout.channels) - 1)
    if given is not None:
        sides = (given, given) if isinstance(given, int) else given
        if any(side < 1 or side % unit for side in sides):
            raise UsageError(
                f"weights {where}: sample_size is {given}; {len(layout.channels)} levels need a multiple of {unit}"
            )
        return given, ()
    if known := KNOWN.get((layout.multipliers, layout.attention)):
        return known, ()
    if len(layout.attention) == 1:
        guess = ATTENTION_WIDTH * 2 ** layout.attention[0]
        if guess % unit == 0:
            return guess, (
                f"image size {guess} is a guess, from attention at {ATTENTION_WIDTH}; or say ?sample_size=N",
            )
    raise UsageError(
        f"weights {where}: multipliers {layout.multipliers} with attention at the levels {layout.attention or 'none'} "
        "do not tell the image size; say ?sample_size=N"
    )
