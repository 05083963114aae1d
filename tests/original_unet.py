"""The U-Net of Ho et al. 2020 (appendix B) written out for the tests, under the names that DDIM's files carry.

It shares no code with diffusers or with the loader: what a converted file computes is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every norm


def embedding(timestep: Tensor, width: int, dtype: torch.dtype, *, divide_last: bool = False) -> Tensor:
    """[sin(t f_i), cos(t f_i)], f_i = 10000^(-i / (half - 1)) in float32, in which the models were trained.

    Two ways to round the exponent, up to 4e-5 apart at t = 999: i * (log 10000 / (half - 1)), as in the original code,
    or (i * log 10000) / (half - 1), as in diffusers.
    """
    half = width // 2
    places = torch.arange(half, dtype=torch.float32)
    exponents = places * math.log(10000) / (half - 1) if divide_last else places * (math.log(10000) / (half - 1))
    frequencies = torch.exp(-exponents)
    angles = timestep.reshape(-1, 1).float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


class Holder(nn.Module):
    """Named parts and nothing else."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Resnet(nn.Module):
    def __init__(self, taken: int, given: int, time: int, shortcut: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, taken, EPS), nn.GroupNorm(32, given, EPS)
        self.conv1, self.conv2 = nn.Conv2d(taken, given, 3, padding=1), nn.Conv2d(given, given, 3, padding=1)
        self.temb_proj = nn.Linear(time, given)
        self.shortcut = shortcut if taken != given else ""
        if self.shortcut:
            self.add_module(shortcut, nn.Conv2d(taken, given, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(time))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        skip: Tensor = self.get_submodule(self.shortcut)(x) if self.shortcut else x
        return h + skip


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C)) v over all pixels, one head, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(self.norm(x)).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        found: Tensor = self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
        return x + found


class OriginalUNet(nn.Module):
    """``forward(x, timestep)``; ``attend`` are the levels with attention, finest 0."""

    def __init__(
        self, base: int, multipliers: Sequence[int], layers: int, attend: Sequence[int], channels: int = 3,
        shortcut: str = "nin_shortcut",
    ) -> None:  # fmt: skip
        super().__init__()
        self.base, self.layers, self.levels = base, layers, len(multipliers)
        self.divide_last = False
        widths, time = [base * m for m in multipliers], 4 * base
        self.temb = Holder(dense=nn.ModuleList([nn.Linear(base, time), nn.Linear(time, time)]))
        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        skips, now = [base], base
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            stage = Holder(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(layers):
                stage.block.append(Resnet(now, width, time, shortcut))  # type: ignore[operator,union-attr]
                now = width
                skips.append(now)
                if level in attend:
                    stage.attn.append(Attention(now))  # type: ignore[operator,union-attr]
            if level + 1 < self.levels:
                stage.downsample = Holder(conv=nn.Conv2d(now, now, 3, stride=2))
                skips.append(now)
            self.down.append(stage)
        self.mid = Holder(
            block_1=Resnet(now, now, time, shortcut), attn_1=Attention(now), block_2=Resnet(now, now, time, shortcut)
        )
        stages = []
        for level in reversed(range(self.levels)):
            stage = Holder(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(layers + 1):
                stage.block.append(Resnet(now + skips.pop(), widths[level], time, shortcut))  # type: ignore[operator,union-attr]
                now = widths[level]
                if level in attend:
                    stage.attn.append(Attention(now))  # type: ignore[operator,union-attr]
            if level:
                stage.upsample = Holder(conv=nn.Conv2d(now, now, 3, padding=1))
            stages.append(stage)
        self.up.extend(reversed(stages))
        self.norm_out, self.conv_out = nn.GroupNorm(32, now, EPS), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        part = self.get_submodule
        time = embedding(timestep, self.base, x.dtype, divide_last=self.divide_last)
        time = part("temb.dense.1")(F.silu(part("temb.dense.0")(time)))
        h = self.conv_in(x)
        skips = [h]
        for level in range(self.levels):
            for j in range(self.layers):
                h = part(f"down.{level}.block.{j}")(h, time)
                h = self.attend("down", level, j, h)
                skips.append(h)
            if level + 1 < self.levels:
                h = part(f"down.{level}.downsample.conv")(F.pad(h, (0, 1, 0, 1)))  # right and below only
                skips.append(h)
        h = part("mid.block_2")(part("mid.attn_1")(part("mid.block_1")(h, time)), time)
        for level in reversed(range(self.levels)):
            for j in range(self.layers + 1):
                h = part(f"up.{level}.block.{j}")(torch.cat([h, skips.pop()], 1), time)
                h = self.attend("up", level, j, h)
            if level:
                h = part(f"up.{level}.upsample.conv")(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        assert not skips
        output: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return output

    def attend(self, side: str, level: int, j: int, h: Tensor) -> Tensor:
        """Through the attention of a block, if it has one."""
        stage = self.get_submodule(f"{side}.{level}.attn")
        assert isinstance(stage, nn.ModuleList)
        return stage[j](h) if len(stage) else h


def random_unet(seed: int = 0, **settings: object) -> OriginalUNet:
    """Random weights of the usual size, norms and biases off their neutral values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = OriginalUNet(**settings)  # type: ignore[arg-type]
        for parameter in unet.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)
