"""The range of a quantised activation: what its values were on the trajectory, and where to clip them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.errors import UsageError
from mmd_export.precision.formats import Grid
from mmd_export.precision.trajectory import Calls, follow

# Bins of equal ratio: histograms of different batches and steps add up without a range agreed on before.
_PER_OCTAVE, _OCTAVES = 64, 24
_BINS = 2 * _OCTAVES * _PER_OCTAVE
_CENTRES = 2.0 ** ((np.arange(_BINS) + 0.5) / _PER_OCTAVE - _OCTAVES)
_PERCENTILE = 0.9999


@dataclass
class Histogram:
    """Magnitudes of one activation; zeros are counted apart, they cost nothing on any grid."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    largest: float = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count ``values``, of any shape."""
        magnitudes = np.abs(values[values != 0.0]).astype(np.float64)
        if magnitudes.size:
            bins = np.floor((np.log2(magnitudes) + _OCTAVES) * _PER_OCTAVE).astype(np.int64).clip(0, _BINS - 1)
            self.counts += np.bincount(bins, minlength=_BINS)
            self.largest = max(self.largest, float(magnitudes.max()))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts, max(self.largest, other.largest))

    def limit(self, clip: str, grid: Grid) -> float:
        """Where to clip: ``minmax`` nowhere, ``percentile`` above 99.99 % of the values, ``mse`` at the least error."""
        if self.largest == 0.0:
            return 1.0
        if clip == "percentile":
            place = int(np.searchsorted(np.cumsum(self.counts), _PERCENTILE * self.counts.sum()))
            return min(self.largest, float(_CENTRES[place]))
        if clip == "mse" and grid.whole:
            limits = self.largest * 2.0 ** (-np.arange(0.0, 4.0, 0.125))
            return float(min(limits, key=lambda limit: self.squared_error(limit, grid)))
        return self.largest

    def squared_error(self, limit: float, grid: Grid) -> float:
        """Sum of (x - Q(x))^2 with scale s = limit / largest q: x^2 below s / 2, s^2 / 12, (x - limit)^2 above it."""
        scale = limit / grid.largest
        inside = np.where(scale / 2 < _CENTRES, scale**2 / 12, _CENTRES**2)
        return float(self.counts @ np.where(limit < _CENTRES, (_CENTRES - limit) ** 2, inside))


def histograms(calls: Calls, values: Sequence[ir.Value], images: int) -> list[list[Histogram]]:
    """One of each of ``values`` for each of the K calls: ``[k][i]``."""
    names = [str(value.name) for value in values]
    found = [[Histogram() for _ in names] for _ in range(calls.plan.step_count)]

    def watch(k: int, seen: Mapping[str, NDArray[Any]]) -> None:
        for i in range(len(names)):
            array = seen[f"activation.{i}"]
            if not np.isfinite(array).all():
                what = "NaN or infinite in call"
                raise UsageError(f"value {names[i]!r} is {what} {k} of the float32 network; check its weights")
            found[k][i].add(array)

    follow(calls, _with_outputs(calls.model, names), images, watch)
    return found


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The model with values called ``names`` as further outputs ``activation.<i>``."""
    watched = model.clone()
    graph = watched.graph
    by_name = {value.name: value for value in graph.inputs}
    by_name |= {value.name: value for node in graph for value in node.outputs}
    for i, name in enumerate(names):
        node = ir.Node("", "Identity", [by_name[name]], num_outputs=1)
        graph.append(node)
        node.outputs[0].name, node.outputs[0].type = f"activation.{i}", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(node.outputs[0])
    return watched


def rounded_scale(limit: float, grid: Grid) -> np.float32:
    """limit / largest q to 8 bits, upwards, so that the last bits of another machine's sums change no byte."""
    mantissa, exponent = math.frexp(limit / grid.largest)
    return np.float32(math.ldexp(math.ceil(mantissa * 256.0 - 1e-3) / 256.0, exponent))
