"""What quantisation-aware tuning has to know of a call: its layers, which of them a recipe quantises, their scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmd_export.precision.formats import GRIDS, Grid
from mmd_export.precision.layers import fold_transposes, layers
from mmd_export.precision.lower import CALIBRATED, typed
from mmd_export.precision.quantise import Recipe, chosen_layers, measured_scales, weight_grid
from mmd_export.precision.trajectory import Calls


@dataclass(frozen=True)
class LayerRanges:
    """One layer of the call, in the graph's order.

    ``weight``: (O, ...), channels first; ``grid``: of the weight, None where the layer stays float32; ``scales``: of
    the activation in each call, empty where it has no grid.
    """

    weight: NDArray[np.float32]
    grid: Grid | None
    scales: tuple[float, ...] = ()


def layer_ranges(calls: Calls, precision: str, images: int | None = None) -> list[LayerRanges]:
    """Every layer of ``calls``, with the ranges that ``lower`` would set from ``images`` trajectories."""
    grid, recipe = GRIDS[precision], Recipe()
    model = typed(calls.model)
    fold_transposes(model)
    chosen = chosen_layers(model, recipe)
    values = list(dict.fromkeys(layer.activation for layer in chosen))
    found: dict[object, tuple[float, ...]] = {}
    if grid.activations and chosen:
        watched = Calls(model, calls.constants, calls.plan, calls.shape, calls.batch, calls.conditions)
        rows = measured_scales(watched, values, grid, recipe, images or CALIBRATED)
        found = {value: tuple(float(row[i]) for row in rows) for i, value in enumerate(values)}
    nodes = {layer.node for layer in chosen}
    ranges = []
    for layer in layers(model):
        assert layer.weight.const_value is not None
        array = np.moveaxis(layer.weight.const_value.numpy(), layer.axis, 0)
        if layer.node in nodes:
            used = weight_grid(grid, recipe, convolution=layer.convolution)
            ranges.append(LayerRanges(array, used, found.get(layer.activation, ())))
        else:
            ranges.append(LayerRanges(array, None))
    return ranges
