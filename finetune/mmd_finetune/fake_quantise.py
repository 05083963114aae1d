"""Rounding as the target's Q/DQ pairs and casts do it, with a straight-through gradient (Bengio et al. 2013).

The value is exactly the rounded one; the gradient is that of the identity, and 0 where a grid clips.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmd_export.precision.formats import FP16, W8, Grid, Half
from mmd_export.precision.quantise import SHRINK, block_size

LOWEST_INT8 = -128.0  # QuantizeLinear saturates at the type's own limits, -128 and 127


def round_half(x: Tensor, half: Half) -> Tensor:
    """``x`` in 16 bits and back. What leaves the range stays as it is: there the target keeps float32."""
    dtype = torch.float16 if half == FP16 else torch.bfloat16
    with torch.no_grad():
        rounded = x.to(dtype).to(x.dtype)
        rounded = torch.where(torch.isfinite(rounded), rounded, x)
    return _straight_through(x, rounded)


def on_activation_grid(x: Tensor, scale: float, grid: Grid) -> Tensor:
    """s Q(x / s) of an activation: saturated, to nearest, ties to even; ``scale`` as the graph holds it, float32."""
    lowest = LOWEST_INT8 if grid.whole else -grid.largest
    with torch.no_grad():
        steps = x / scale
        steps = steps.round() if grid.whole else steps
        steps = steps.clamp(lowest, grid.largest)
        if not grid.whole:
            steps = steps.to(torch.float8_e4m3fn).to(x.dtype)
        rounded = steps * scale
    return _straight_through(x.clamp(lowest * scale, grid.largest * scale), rounded)


def on_weight_grid(weight: Tensor, grid: Grid) -> Tensor:
    """A weight (O, ...) as the graph stores it and multiplies with: one scale a channel O, or one a block."""
    with torch.no_grad():
        rows = weight.reshape(weight.shape[0], -1)
        size = None if grid.block is None else block_size(rows.shape[1], grid.block)
        if size is None:
            used = grid if grid.block is None else W8
            rounded = _rounded(rows, _reach(rows, used), used)
        else:
            parts = rows.reshape(rows.shape[0], -1, size)
            rounded = _rounded(parts, _best_scale(parts, grid), grid)
    return _straight_through(weight, rounded.reshape(weight.shape))


def _reach(parts: Tensor, grid: Grid) -> Tensor:
    """The scale (..., 1) at which the largest weight of (..., n) is the largest of the grid."""
    reach = parts.abs().amax(-1, keepdim=True) / grid.largest
    return torch.where(reach == 0.0, torch.ones_like(reach), reach)


def _best_scale(parts: Tensor, grid: Grid) -> Tensor:
    """For each block of (O, blocks, n) the scale of least squared error, (O, blocks, 1)."""
    reach = _reach(parts, grid)
    best, error = reach, torch.full_like(reach, float("inf"))
    for shrink in SHRINK:
        scale = reach * float(np.float32(shrink))
        found = (_rounded(parts, scale, grid) - parts).square().sum(-1, keepdim=True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return best


def _rounded(parts: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """On the grid and back; ``mmd_export.precision.quantise.on_grid`` in torch."""
    steps = (parts / scale).clamp(-grid.largest, grid.largest)
    steps = steps.round() if grid.whole else steps.to(torch.float8_e4m3fn).to(parts.dtype)
    return steps * scale


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded``, to the last bit, with the gradient of ``x``."""
    return rounded + (x - x.detach())
