"""The UNet of Nichol and Dhariwal 2021 written out for the tests, under the names that guided-diffusion's files carry.

It shares no code with diffusers or with the loader: what a converted file computes is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resample(nn.Module):
    """Twice as fine by repetition, or half by a stride or a mean; ``conv`` is called ``op`` on the way down."""

    def __init__(self, width: int, *, up: bool, conv: bool) -> None:
        super().__init__()
        self.up, self.name = up, ("conv" if up else "op") if conv else ""
        if conv:
            self.add_module(self.name, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif not self.name:
            x = F.avg_pool2d(x, 2)
        result: Tensor = self.get_submodule(self.name)(x) if self.name else x
        return result


class Resnet(nn.Module):
    def __init__(self, taken: int, given: int, time: int, *, film: bool, resample: str = "") -> None:
        super().__init__()
        self.film = film
        self.resample = Resample(taken, up=resample == "up", conv=False) if resample else nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, taken), nn.SiLU(), nn.Conv2d(taken, given, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, given * (2 if film else 1)))
        conv = nn.Conv2d(given, given, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, given), nn.SiLU(), nn.Dropout(0.1), conv)
        self.skip_connection = nn.Identity() if taken == given else nn.Conv2d(taken, given, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h: Tensor = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        row = self.emb_layers(time)[..., None, None]
        if self.film:
            scale, shift = row.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + row)
        skip: Tensor = self.skip_connection(self.resample(x))
        return skip + h


class Attention(nn.Module):
    def __init__(self, width: int, head: int, *, new_order: bool) -> None:
        super().__init__()
        self.head, self.new_order = head or width, new_order
        self.norm, self.qkv = nn.GroupNorm(32, width), nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        rows, count = self.qkv(self.norm(flat)), x.shape[1] // self.head
        order = "b (t h c) n" if self.new_order else "b (h t c) n"
        sizes = {"t": 3, "h": count, "c": self.head}
        parts = rows.reshape(len(x), *(sizes[axis] for axis in order[3:8:2]), -1)
        q, k, v = parts.unbind(1 if self.new_order else 2)
        weights = torch.einsum("bhci,bhcj->bhij", q, k).div(math.sqrt(self.head)).softmax(-1)
        found: Tensor = self.proj_out(torch.einsum("bhij,bhcj->bhci", weights, v).reshape(flat.shape))
        return (flat + found).reshape(x.shape)


class GuidedUNet(nn.Module):
    """``forward(x, timestep, class_labels)``; ``attend``: levels; ``head``: channels of a head, 0 for one head."""

    def __init__(
        self, *, base: int = 32, multipliers: Sequence[int] = (1, 2), layers: int = 1, attend: Sequence[int] = (1,),
        head: int = 0, film: bool = False, updown: bool = False, new_order: bool = False, classes: int = 0,
        channels: int = 3, given: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base, time, last = base, 4 * base, len(multipliers) - 1
        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        self.label_emb = nn.Embedding(classes, time) if classes else None
        now, skips = base, [base]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, base, 3, padding=1)])])

        def stage(taken: int, width: int, level: int) -> nn.ModuleList:
            attention = [Attention(width, head, new_order=new_order)] if level in attend else []
            return nn.ModuleList([Resnet(taken, width, time, film=film), *attention])

        def join(width: int, *, up: bool) -> nn.Module:
            if not updown:
                return Resample(width, up=up, conv=True)
            return Resnet(width, width, time, film=film, resample="up" if up else "down")

        for level, width in enumerate(base * m for m in multipliers):
            for _ in range(layers):
                self.input_blocks.append(stage(now, width, level))
                now = width
                skips.append(now)
            if level < last:
                self.input_blocks.append(nn.ModuleList([join(now, up=False)]))
                skips.append(now)
        middle = [Resnet(now, now, time, film=film), Attention(now, head, new_order=new_order)]
        self.middle_block = nn.ModuleList([*middle, Resnet(now, now, time, film=film)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for j in range(layers + 1):
                block = stage(now + skips.pop(), now := base * multipliers[level], level)
                if level and j == layers:
                    block.append(join(now, up=True))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, given, 3, padding=1))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        half = self.base // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timestep.reshape(-1, 1).float() * frequencies
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        if self.label_emb is not None:
            time = time + self.label_emb(class_labels)
        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h, time)
            skips.append(h)
        h = run(self.middle_block, h, time)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], 1), time)
        output: Tensor = self.out(h)
        return output


def run(block: nn.Module, h: Tensor, time: Tensor) -> Tensor:
    """Through the parts of a block; resnets are told the time."""
    for part in block.children():
        h = part(h, time) if isinstance(part, Resnet) else part(h)
    return h
