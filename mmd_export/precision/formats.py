"""Number formats, and the part of each range that a value seen on a few images may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.errors import UsageError

# Other noises reach further than those scanned. Between 4 and 64 images the largest value of any layer grew by less
# than a factor of 2 (benchmarks/results/precision.json), so 8 is generous.
HEADROOM = 8.0


@dataclass(frozen=True)
class Half:
    """A 16-bit floating-point format; ``opset``: the first in which every operation of a network takes it."""

    name: str
    dtype: ir.DataType
    numpy: np.dtype[np.generic]
    opset: int

    @property
    def largest(self) -> float:
        """The largest magnitude that a value on the scanned trajectory may have."""
        return float(_limits(self.numpy).max) / HEADROOM

    @property
    def smallest(self) -> float:
        """The smallest normal number: below it bits are lost, and at last all of them."""
        return float(_limits(self.numpy).tiny)

    def round(self, array: NDArray[Any]) -> NDArray[Any]:
        """To nearest, ties to even."""
        with np.errstate(over="ignore"):
            return array.astype(self.numpy)


@dataclass(frozen=True)
class Grid:
    """Values q * scale with q in a small format, symmetric: -largest <= q <= largest.

    ``block``: this many weights share a scale, None for one a channel. ``activations``: they are on a grid too.
    """

    name: str
    dtype: ir.DataType
    numpy: np.dtype[np.generic]
    largest: float
    activations: bool
    block: int | None = None
    opset: int = 20

    @property
    def whole(self) -> bool:
        """Whether q is an integer."""
        return self.dtype != ir.DataType.FLOAT8E4M3FN


def _limits(numpy: np.dtype[np.generic]) -> Any:
    return ml_dtypes.finfo(numpy)  # type: ignore[no-untyped-call]  # ml_dtypes 0.6 leaves it without annotations


FP16 = Half("fp16", ir.DataType.FLOAT16, np.dtype(np.float16), 20)
BF16 = Half("bf16", ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 22)  # Conv takes it from opset 22 on
INT8 = Grid("int8", ir.DataType.INT8, np.dtype(np.int8), 127.0, activations=True)
FP8 = Grid("fp8", ir.DataType.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn), 448.0, activations=True)
W8 = Grid("w8", ir.DataType.INT8, np.dtype(np.int8), 127.0, activations=False)
# Blocks and 4 bits came to DequantizeLinear with opset 21.
W4 = Grid("w4", ir.DataType.INT4, np.dtype(ml_dtypes.int4), 7.0, activations=False, block=32, opset=21)
HALVES = {half.name: half for half in (FP16, BF16)}
GRIDS = {grid.name: grid for grid in (INT8, FP8, W8, W4)}


def require_ranges(precision: str, images: int | None) -> None:
    """Raise UsageError for calibration images where no range is set: nothing is rounded, or only weights are."""
    has = precision in HALVES or (precision in GRIDS and GRIDS[precision].activations)
    if images is not None and not has:
        raise UsageError(f"--calibration is {images}, but --precision {precision} has no ranges to set; leave it out")
