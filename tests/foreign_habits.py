"""Habits of networks as people write them, for ``python:tests.foreign_habits:NAME``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.foreign_nets import Plain


class KeepsTable(Plain):
    """Computes its table at the first call and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self.table is None or self.table.dtype != x.dtype:
            self.table = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).cos()
        return super().forward(x * self.table, timestep)


@functools.lru_cache
def _places(size: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=dtype).cos()


class KeepsByFunction(Plain):
    """The same by a function of the module's file."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x * _places(x.shape[-1], x.dtype), timestep)


class KeepsFeatures(Plain):
    """Leaves what it has computed where others may look at it."""

    def features(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.seen = super().features(x, timestep)
        return self.seen


class OfWholeTimesteps(Plain):
    """Looks its embedding up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) * torch.tanh(self.embedding(timestep).reshape(1, 1, 1, 1))


class Clamping(Plain):
    """Clamps its input in place, which is the same a second time."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x.clamp_(-1, 1), timestep)


class Scaling(Plain):
    """Scales its input in place, which is another one then."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), timestep)


class Part(nn.Module):
    """A part that a compiler has had."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Compiled(Plain):
    """Its part is compiled by torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = torch.compile(Part())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(self.part(x), timestep)


class Scripted(Compiled):
    """Its part is TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.script(Part())


class Autocast(Plain):
    """Leaves autocast for a layer, as for norms."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = torch.tanh(x)
        return super().forward(x, timestep)


class OfHalfItsLength(Plain):
    """Asks for the length of the batch in a way that fixes it."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        both = torch.cat([x, x.flip(3)])
        a, b = torch.split(both, len(both) // 2)
        return super().forward(a, timestep) - b
