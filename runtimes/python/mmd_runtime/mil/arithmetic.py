"""MIL ops that compute element by element, or reduce: the formulas of coremltools' op reference.

Half precision is computed in float32 and rounded once an op, as Core ML documents it for a single op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmd_runtime.mil.blobs import NUMPY

Array: TypeAlias = NDArray[Any]
Args: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Args], Any]


def wide(x: Array) -> Array:
    """Half precision as float32, everything else as it is."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def like(result: Array, x: Array) -> Array:
    """``result`` rounded to the type of ``x``; a value beyond it becomes infinite, as on the device."""
    with np.errstate(over="ignore"):
        return np.asarray(result, dtype=x.dtype)


def _unary(function: Callable[[Array], Array]) -> Rule:
    return lambda args: like(function(wide(args["x"])), args["x"])


def _binary(function: Callable[[Array, Array], Array]) -> Rule:
    """Both operands have one type: numpy would widen a mixture, and the declared type would not be met."""

    def rule(args: Args) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return np.asarray(function(args["x"], args["y"]))

    return rule


def _reduce(function: Callable[..., Array]) -> Rule:
    def rule(args: Args) -> Array:
        x = args["x"]
        axes = tuple(int(axis) for axis in args["axes"]) if "axes" in args else None
        return like(function(wide(x), axis=axes, keepdims=bool(args.get("keep_dims", False))), x)

    return rule


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); exp overflows to infinity where the result is 0."""
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


def erf(x: Array) -> Array:
    """Abramowitz and Stegun, 7.1.26, in float64; error below 1.5e-7."""
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x).astype(np.float64))
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + coefficient) * t
    return np.asarray(np.sign(x) * (1.0 - series * np.exp(-(x.astype(np.float64) ** 2))))


def _gelu(args: Args) -> Array:
    x, mode = args["x"], args.get("mode", "EXACT")
    y = wide(x)
    if mode == "EXACT":
        return like(0.5 * y * (1.0 + erf(y / math.sqrt(2.0))), x)
    if mode == "TANH_APPROXIMATION":
        return like(0.5 * y * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3))), x)
    return like(y * sigmoid(1.702 * y), x)


def _clip(args: Args) -> Array:
    return np.asarray(np.clip(args["x"], args["alpha"], args["beta"]))


def _rsqrt(args: Args) -> Array:
    x = args["x"]
    return like(1.0 / np.sqrt(wide(x) + np.float32(args.get("epsilon", 1e-12))), x)


def _cast(args: Args) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(args["x"]).astype(NUMPY[args["dtype"]])


def _select(args: Args) -> Array:
    return np.asarray(np.where(args["cond"], args["a"], args["b"]))


def softmax(x: Array, axis: int) -> Array:
    """exp(x - max) / sum, in float32."""
    y = wide(x)
    with np.errstate(invalid="ignore"):
        weights = np.exp(y - y.max(axis=axis, keepdims=True))
    return like(weights / weights.sum(axis=axis, keepdims=True), x)


RULES: dict[str, Rule] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.true_divide),
    "pow": _binary(np.power),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "abs": _unary(np.abs),
    "square": _unary(np.square),
    "sqrt": _unary(np.sqrt),
    "exp": _unary(np.exp),
    "sin": _unary(np.sin),
    "cos": _unary(np.cos),
    "tanh": _unary(np.tanh),
    "erf": _unary(erf),
    "floor": _unary(np.floor),
    "ceil": _unary(np.ceil),
    "round": _unary(np.rint),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "sigmoid": _unary(sigmoid),
    "silu": _unary(lambda x: x * sigmoid(x)),
    "softplus": _unary(lambda x: np.logaddexp(np.zeros_like(x), x)),
    "gelu": _gelu,
    "clip": _clip,
    "rsqrt": _rsqrt,
    "cast": _cast,
    "select": _select,
    "softmax": lambda args: softmax(args["x"], int(args.get("axis", -1))),
    "reduce_mean": _reduce(np.mean),
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_sum_square": _reduce(lambda x, **kept: np.sum(np.square(x), **kept)),
}
