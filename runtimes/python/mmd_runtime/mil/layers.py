"""MIL ops with weights, and the norms.

Products of half precision are summed in float32 and rounded once. A norm rounds every intermediate of its formula to
half precision: the square of a centred value above 255 is infinite there, whatever the hardware would do about it, so
a graph that relies on wider registers fails here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mmd_runtime.mil.arithmetic import Args, Array, Rule, like, softmax, wide
from mmd_runtime.mil.wire import MalformedError


def _matmul(args: Args) -> Array:
    x, y = wide(args["x"]), wide(args["y"])
    x = np.swapaxes(x, -1, -2) if args.get("transpose_x", False) else x
    y = np.swapaxes(y, -1, -2) if args.get("transpose_y", False) else y
    return like(np.matmul(x, y), args["x"])


def _linear(args: Args) -> Array:
    y = np.matmul(wide(args["x"]), wide(args["weight"]).T)
    return like(y + wide(args["bias"]) if "bias" in args else y, args["x"])


def _attention(args: Args) -> Array:
    """softmax(q k^T / sqrt(E) + mask) v, over the last two axes."""
    query, key, value = args["query"], args["key"], args["value"]
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = like(np.matmul(wide(query) * np.float32(scale), np.swapaxes(wide(key), -1, -2)), query)
    if "attn_mask" in args:
        mask = args["attn_mask"]
        scores = np.where(mask, scores, -np.inf).astype(query.dtype) if mask.dtype == bool else scores + mask
    return like(np.matmul(wide(softmax(scores, -1)), wide(value)), query)


def _conv(args: Args) -> Array:
    """Cross-correlation of (B, C, *S) with (O, C / groups, *K): windows as rows of one matrix product."""
    x, weight = args["x"], wide(args["weight"])
    spatial = x.ndim - 2
    strides, dilations = (_sizes(args.get(name), spatial) for name in ("strides", "dilations"))
    groups = int(args.get("groups", 1))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    padded = np.pad(wide(x), [(0, 0), (0, 0), *_padding(args, x.shape[2:], reach, strides)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, x.ndim)))
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
    windows = windows[(*steps, *(slice(None, None, dilation) for dilation in dilations))]
    out = windows.shape[2 : 2 + spatial]
    # (B, C, *out, *K) -> (B, C, *K, *out): the matrix has the channels of a group times the kernel as rows
    order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    columns = windows.transpose(order).reshape(len(x), groups, -1, math.prod(out))
    kernel = weight.reshape(groups, weight.shape[0] // groups, -1)
    result = np.matmul(kernel, columns).reshape(len(x), weight.shape[0], *out)
    if "bias" in args:
        result = result + wide(args["bias"]).reshape(-1, *([1] * spatial))
    return like(result, x)


def _sizes(values: Any, count: int) -> tuple[int, ...]:
    return (1,) * count if values is None else tuple(int(value) for value in values)


def _padding(args: Args, sizes: Any, reach: list[int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis."""
    kind = args.get("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(reach)
    if kind == "custom":
        amounts = [int(value) for value in args["pad"]]
        return list(zip(amounts[::2], amounts[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise MalformedError(f"pad_type {kind!r} is unknown")
    pairs = []
    for size, window, step in zip(sizes, reach, strides, strict=True):
        total = max(0, (-(-size // step) - 1) * step + window - size)
        before = total // 2 if kind == "same" else total - total // 2
        pairs.append((before, total - before))
    return pairs


def _avg_pool(args: Args) -> Array:
    x, spatial = args["x"], args["x"].ndim - 2
    sizes, strides = [int(size) for size in args["kernel_sizes"]], _sizes(args.get("strides"), spatial)
    if any(amount for pair in _padding(args, x.shape[2:], sizes, strides) for amount in pair):
        raise MalformedError("avg_pool with padding has no rule here")
    windows = np.lib.stride_tricks.sliding_window_view(wide(x), sizes, axis=tuple(range(2, x.ndim)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides))]
    return like(windows.mean(axis=tuple(range(-spatial, 0))), x)


def _normalised(x: Array, axes: tuple[int, ...], epsilon: Any) -> Array:
    """(x - mean) / sqrt(variance + epsilon), every intermediate rounded to the type of ``x``."""
    centred = like(wide(x) - wide(like(wide(x).mean(axis=axes, keepdims=True), x)), x)
    with np.errstate(over="ignore"):
        square = like(np.square(wide(centred)), x)
    variance = like(wide(square).mean(axis=axes, keepdims=True), x)
    return like(wide(centred) * wide(_inverse_root(variance, epsilon)), x)


def _inverse_root(variance: Array, epsilon: Any) -> Array:
    total = like(wide(variance) + wide(np.asarray(epsilon, variance.dtype)), variance)
    with np.errstate(divide="ignore"):
        return like(1.0 / np.sqrt(wide(total)), variance)


def _scaled(x: Array, args: Args, shape: tuple[int, ...]) -> Array:
    """gamma * x + beta, each of ``shape``."""
    y = x if "gamma" not in args else like(wide(x) * wide(args["gamma"]).reshape(shape), x)
    return y if "beta" not in args else like(wide(y) + wide(args["beta"]).reshape(shape), x)


def _layer_norm(args: Args) -> Array:
    x = args["x"]
    axes = tuple(int(axis) % x.ndim for axis in args["axes"]) if "axes" in args else tuple(range(1, x.ndim))
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(x.shape))
    return _scaled(_normalised(x, axes, args.get("epsilon", 1e-5)), args, shape)


def _instance_norm(args: Args) -> Array:
    x = args["x"]
    shape = (1, -1, *([1] * (x.ndim - 2)))
    return _scaled(_normalised(x, tuple(range(2, x.ndim)), args.get("epsilon", 1e-5)), args, shape)


def _batch_norm(args: Args) -> Array:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, with stored mean and variance."""
    x = args["x"]
    shape = (1, -1, *([1] * (x.ndim - 2)))
    centred = like(wide(x) - wide(args["mean"]).reshape(shape), x)
    inverse = _inverse_root(args["variance"], args.get("epsilon", 1e-5))
    return _scaled(like(wide(centred) * wide(inverse).reshape(shape), x), args, shape)


RULES: dict[str, Rule] = {
    "matmul": _matmul,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "avg_pool": _avg_pool,
    "layer_norm": _layer_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
}
