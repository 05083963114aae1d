"""MIL ops that move values: shapes, slices, joins, look-ups, and weights stored in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmd_runtime.mil.arithmetic import Args, Array, Rule
from mmd_runtime.mil.blobs import unpacked
from mmd_runtime.mil.wire import MalformedError


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(values))


def _reshape(args: Args) -> Array:
    x = args["x"]
    shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(_ints(args["shape"]))]
    try:
        return np.asarray(x).reshape(shape)
    except ValueError as error:
        raise MalformedError(f"{x.shape} cannot become {tuple(shape)}") from error


def _squeeze(args: Args) -> Array:
    return np.asarray(np.squeeze(args["x"], axis=_ints(args["axes"]) if "axes" in args else None))


def _concat(args: Args) -> Array:
    if args.get("interleave", False):
        raise MalformedError("concat with interleave has no rule here")
    return np.concatenate(args["values"], axis=int(args["axis"]))


def _split(args: Args) -> tuple[Array, ...]:
    x, axis = args["x"], int(args["axis"])
    if "split_sizes" in args:
        ends = np.cumsum(args["split_sizes"])[:-1]
        return tuple(np.split(x, ends, axis=axis))
    return tuple(np.split(x, int(args["num_splits"]), axis=axis))


def _slice_by_index(args: Args) -> Array:
    x = args["x"]
    begin, end = _ints(args["begin"]), _ints(args["end"])
    stride = _ints(args.get("stride", [1] * x.ndim))
    open_begin, open_end, squeezed = (
        [bool(flag) for flag in args.get(name, [False] * x.ndim)] for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    where: list[slice | int] = []
    for axis in range(x.ndim):
        if squeezed[axis]:
            where.append(begin[axis])
            continue
        first, last = None if open_begin[axis] else begin[axis], None if open_end[axis] else end[axis]
        where.append(slice(first, last, stride[axis]))
    return np.asarray(x[tuple(where)])


def _slice_by_size(args: Args) -> Array:
    x, begin, size = args["x"], _ints(args["begin"]), _ints(args["size"])
    ends = [None if count == -1 else first + count for first, count in zip(begin, size, strict=True)]
    return np.asarray(x[tuple(slice(first, last) for first, last in zip(begin, ends, strict=True))])


def _pad(args: Args) -> Array:
    x, amounts = args["x"], _ints(args["pad"])
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    mode = args.get("mode", "constant")
    if mode == "constant":
        return np.pad(x, pairs, constant_values=args.get("constant_val", x.dtype.type(0)))
    kinds: dict[str, Any] = {"reflect": "reflect", "replicate": "edge"}
    return np.asarray(np.pad(x, pairs, mode=kinds[mode]))


def _gather(args: Args) -> Array:
    if int(args.get("batch_dims", 0)):
        raise MalformedError("gather with batch_dims has no rule here")
    x, axis = args["x"], int(args.get("axis", 0))
    indices = np.asarray(args["indices"]).astype(np.int64)
    size = x.shape[axis]
    if indices.size and (indices.min() < -size or indices.max() >= size):
        raise MalformedError(f"index {int(indices.max())} of gather is outside of {size} rows")
    return np.take(x, indices, axis=axis)


def _nearest(x: Array, height: int, width: int) -> Array:
    """Pixel i of the result is pixel floor(i * size / wanted) of the source."""
    rows = np.arange(height) * x.shape[-2] // height
    columns = np.arange(width) * x.shape[-1] // width
    return np.asarray(x[..., rows[:, None], columns[None, :]])


def _upsample(args: Args) -> Array:
    x = args["x"]
    factors = [float(args.get(name, 1)) for name in ("scale_factor_height", "scale_factor_width")]
    height, width = (math.floor(size * factor) for size, factor in zip(x.shape[-2:], factors, strict=True))
    return _nearest(x, height, width)


def _affine(args: Args) -> Array:
    """scale * (data - zero point), one pair for each index along ``axis``."""
    data, axis = args["quantized_data"], int(args["axis"])
    shape = [1] * data.ndim
    shape[axis] = -1
    scale, zero = (np.asarray(args[name]) for name in ("scale", "zero_point"))
    scale, zero = (value.reshape(shape) if value.ndim else value for value in (scale, zero))
    return np.asarray((data.astype(np.float32) - zero.astype(np.float32)) * scale, scale.dtype)


def _palette(args: Args) -> Array:
    """lut[indices]: up to iOS 17 packed bits and one table; from iOS 18 on tables by block, (..., 2^bits, 1)."""
    indices, table = args["indices"], args["lut"]
    if "shape" in args:
        shape = _ints(args["shape"])
        bits = int(table.size).bit_length() - 1
        return np.asarray(table[unpacked(indices, bits, math.prod(shape))].reshape(shape))
    if table.shape[-1] != 1:
        raise MalformedError("palettes of vectors have no rule here")
    tables = _blocks(table[..., 0], indices.shape)
    return np.take_along_axis(tables, indices[..., None].astype(np.int64), axis=-1)[..., 0]


def _blockwise(args: Args) -> Array:
    """scale * (data - offset), one pair a block."""
    data, scale = args["data"], args["scale"]
    offset = args.get("offset", scale.dtype.type(0))
    shifted = data.astype(np.float32) - _blocks(np.asarray(offset, np.float32), data.shape)
    return np.asarray(shifted * _blocks(scale, data.shape), scale.dtype)


def _blocks(values: Array, shape: Sequence[int]) -> Array:
    """``values`` repeated so that its first axes have ``shape``."""
    for axis, size in enumerate(shape[: values.ndim]):
        values = np.repeat(values, size // values.shape[axis], axis=axis)
    return values


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "transpose": lambda args: np.transpose(args["x"], _ints(args["perm"])),
    "expand_dims": lambda args: np.expand_dims(args["x"], _ints(args["axes"])),
    "squeeze": _squeeze,
    "concat": _concat,
    "stack": lambda args: np.stack(args["values"], axis=int(args["axis"])),
    "split": _split,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "reverse": lambda args: np.flip(args["x"], _ints(args["axes"]) if "axes" in args else None),
    "tile": lambda args: np.tile(args["x"], _ints(args["reps"])),
    "pad": _pad,
    "gather": _gather,
    "upsample_nearest_neighbor": _upsample,
    "resize_nearest_neighbor": lambda args: _nearest(
        args["x"], int(args["target_size_height"]), int(args["target_size_width"])
    ),
    "identity": lambda args: args["x"],
    "constexpr_affine_dequantize": _affine,
    "constexpr_lut_to_dense": _palette,
    "constexpr_blockwise_shift_scale": _blockwise,
}
