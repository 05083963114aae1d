"""The MMD^2 of the whole batch, over all processes, and its gradient, in blocks: memory does not grow with n^2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmd_finetune.embedding import Embedding
from mmd_finetune.kernels import Kernel
from mmd_finetune.mmd import require_two
from mmd_finetune.world import World

# Kernel values at once, rows and columns: as many as a cache holds, or as keep a GPU busy.
BLOCKS = {"cpu": (256, 1024), "cuda": (2048, 8192)}


def mmd2(features: Tensor, kernel: Kernel, embedding: Embedding, *, biased: bool = False, world: World) -> Tensor:
    """MMD^2 of the generated ``features`` (n, d) of all processes and the real ``embedding``, a float64 scalar.

    Every process brings its own rows and receives the same value. Its gradient reaches its own rows only, and the sum
    over the processes of what follows from them is the gradient of the one global MMD^2.
    """
    value: Tensor = _BlockedMmd2.apply(features, kernel, embedding, biased, world)  # type: ignore[no-untyped-call]
    return value


class _BlockedMmd2(torch.autograd.Function):
    """Value and gradient in one pass over blocks.

    The kernel is symmetric, so d/dx_i sum_jk k(x_j, x_k) is twice the derivative by the first argument: each process
    needs the features of the others as numbers only.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: Kernel, embedding: Embedding, biased: bool, world: World) -> Tensor:
        own = features.detach().double()
        everyone, first = world.gather(own)
        require_two(everyone)
        n = len(everyone)
        pairs = n * n if biased else n * (n - 1)
        rows, columns = BLOCKS[own.device.type]
        value, gradients = own.new_zeros(()), []
        for start, block in _blocks(own, rows):
            x = block.clone()
            gradient = torch.zeros_like(x)
            for column, others in _blocks(everyone, columns):
                itself = None if biased else first + start - column
                sum_, slope = _value_and_slope(kernel, x, others, None, itself)
                value, gradient = value + sum_ / pairs, gradient + 2.0 * slope / pairs
            for column, points in _blocks(embedding.points, columns):
                weights = embedding.weights[column : column + len(points)]
                sum_, slope = _value_and_slope(kernel, x, points, weights, None)
                value, gradient = value - 2.0 * sum_ / n, gradient - 2.0 * slope / n
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients).to(features.dtype))
        return world.sum(value) + embedding.squared_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer.to(gradient.dtype) * gradient, None, None, None, None


def _value_and_slope(
    kernel: Kernel, x: Tensor, y: Tensor, weights: Tensor | None, itself: int | None
) -> tuple[Tensor, Tensor]:
    """sum_ij w_j k(x_i, y_j) and its gradient by x, (N, d).

    ``itself``: x_i is y_j where j - i is this number; such pairs are left out.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        values = kernel(x, y)
        total = values.sum() if weights is None else (values @ weights).sum()
        if itself is not None and -len(x) < itself < len(y):
            total = total - values.diagonal(itself).sum()
        (slope,) = torch.autograd.grad(total, x)
    return total.detach(), slope


def _blocks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The first index of every block, and the block."""
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))
