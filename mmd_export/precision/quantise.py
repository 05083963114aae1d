"""A float32 call with its layers on a grid: Q/DQ pairs in front of them, their weights stored in the grid's type.

    Q(x) = clip(round(x / s), -q, q),  DQ(y) = s y;  Jacob et al. 2018, symmetric: no zero point.

One scale for an activation in each call, or one for all calls; one for each output channel of a weight, or each block.
This is ONNX's explicit quantisation, which TensorRT and onnxruntime fuse and every other runtime computes as written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.precision.formats import INT8, W8, Grid
from mmd_export.precision.islands import promoted
from mmd_export.precision.layers import Layer, fold_transposes, layers, outermost
from mmd_export.precision.ranges import histograms, rounded_scale
from mmd_export.precision.trajectory import Calls
from mmd_export.tuned_precision import TunedPrecision

Floats: TypeAlias = NDArray[np.float32]
# Trial scales of a block, times the one that reaches its largest weight.
SHRINK = np.linspace(0.6, 1.0, 17)
_SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how its ranges are chosen; the defaults are the best of benchmarks/results/precision.json.

    Args:
        clip: ``minmax``, ``percentile`` or ``mse``, see ``Histogram.limit``.
        per_step: a range for each call instead of one for all; a loop reads it from a table.
        ends: also the layers that read the state and that give the output.
        linear: also the linear layers, those of attention.
        seven_bits: which layers' weights have 7 bits: ``none``, ``linear`` or ``all``. onnxruntime makes integer
            products of some linear layers, never of convolutions; a CPU without VNNI may add those in pairs in 16 bits,
            where 2 * 255 * 127 saturates and 2 * 255 * 63 does not.
    """

    clip: str = "mse"
    per_step: bool = True
    ends: bool = False
    linear: bool = True
    seven_bits: str = "linear"


def quantise(
    calls: Calls,
    grid: Grid,
    recipe: Recipe,
    images: int,
    tuned: TunedPrecision | None = None,
    float32: frozenset[str] = frozenset(),
) -> Calls:
    """The calls on ``grid``; the model is changed in place.

    ``images`` set the ranges, where activations have any, unless they are those that it was ``tuned`` with. Layers that
    give one of the values ``float32`` are left out.
    """
    fold_transposes(calls.model)
    kept = promoted(calls.model, float32)
    found = chosen_layers(calls.model, recipe)
    chosen = [layer for layer in found if layer.node not in kept]
    rows = calls.constants
    if grid.activations and chosen:
        values = list(dict.fromkeys(layer.activation for layer in chosen))
        if tuned is None:
            scales = measured_scales(calls, values, grid, recipe, images)
        else:
            scales = _tuned_scales(calls, found, values, tuned)
        rows = _quantise_activations(calls, chosen, values, scales, grid)
    nodes = {layer.node for layer in chosen}
    for layer in chosen:
        quantise_weight(calls.model.graph, layer, weight_grid(grid, recipe, convolution=layer.convolution), nodes)
    opsets = calls.model.graph.opset_imports
    opsets[""] = max(opsets[""], grid.opset)
    return replace(calls, constants=rows)


def weight_grid(grid: Grid, recipe: Recipe, *, convolution: bool) -> Grid:
    """The grid of a layer's weight: ``grid`` itself, or its 7 bits."""
    seven = recipe.seven_bits == "all" or (recipe.seven_bits == "linear" and not convolution)
    return replace(grid, largest=63.0) if seven and grid == INT8 else grid


def measured_scales(
    calls: Calls, values: Sequence[ir.Value], grid: Grid, recipe: Recipe, images: int
) -> list[list[np.float32]]:
    """``[k][i]``: the scale of value i in call k, or one row for all calls."""
    found = histograms(calls, values, images)
    if not recipe.per_step:
        found = [[sum(column[1:], column[0]) for column in zip(*found, strict=True)]]
    return [[rounded_scale(each.limit(recipe.clip, grid), grid) for each in row] for row in found]


def _tuned_scales(
    calls: Calls, found: Sequence[Layer], values: Sequence[ir.Value], tuned: TunedPrecision
) -> list[list[np.float32]]:
    """``[k][i]`` again, from the record of each of the layers ``found``; those that read one value have one scale."""
    steps = calls.plan.step_count
    tuned.require_fit([layer.size for layer in found], steps)
    of_value = {layer.activation: row.scales for layer, row in zip(found, tuned.layers, strict=True)}
    return [[np.float32(of_value[value][k]) for value in values] for k in range(steps)]


def chosen_layers(model: ir.Model, recipe: Recipe) -> list[Layer]:
    """What the recipe quantises."""
    found = layers(model)
    left_out = set() if recipe.ends else outermost(model, found)
    return [layer for layer in found if layer.node not in left_out and (recipe.linear or layer.convolution)]


def _quantise_activations(
    calls: Calls, chosen: Sequence[Layer], values: Sequence[ir.Value], scales: list[list[np.float32]], grid: Grid
) -> list[list[NDArray[Any]]]:
    """A Q/DQ pair behind each of ``values``; the constants of each call, with its scales if each has its own."""
    graph, rows = calls.model.graph, calls.constants
    zero = _initializer(graph, f"{grid.name}/zero", np.zeros((), grid.numpy), grid.dtype)
    nodes = {layer.node for layer in chosen}
    for i, value in enumerate(values):
        if len(scales) == 1:
            scale = _initializer(graph, f"{value.name}/scale", np.asarray(scales[0][i]))
        else:
            scale = ir.Value(name=f"{value.name}/scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
            graph.inputs.append(scale)
        readers = [use.node for use in value.uses() if use.idx == 0 and use.node in nodes]
        first = next(layer.node for layer in chosen if layer.activation is value)
        steps = _node("QuantizeLinear", [value, scale, zero], f"{value.name}/{grid.name}", grid.dtype)
        back = _node("DequantizeLinear", [steps.outputs[0], scale, zero], f"{value.name}/dequantised")
        steps.outputs[0].shape = back.outputs[0].shape = value.shape
        graph.insert_before(first, [steps, back])
        for node in readers:
            node.replace_input_with(0, back.outputs[0])
    if len(scales) == 1:
        return rows
    return [[*row, *map(np.asarray, more)] for row, more in zip(rows, scales, strict=True)]


def quantise_weight(graph: ir.Graph, layer: Layer, grid: Grid, nodes: set[ir.Node]) -> None:
    """The weight once in the grid's type, and a DequantizeLinear in front of those of its layers that are ``nodes``."""
    readers = [use for use in layer.weight.uses() if use.idx == 1 and use.node in nodes]
    if layer.node not in [use.node for use in readers]:
        return  # it came with an earlier layer of the same weight
    back = _dequantised(graph, layer, grid)
    for use in readers:
        use.node.replace_input_with(use.idx, back)


def _dequantised(graph: ir.Graph, layer: Layer, grid: Grid) -> ir.Value:
    weight, axis = layer.weight, layer.axis
    assert weight.const_value is not None
    array: Floats = weight.const_value.numpy()
    if grid.block is None:
        return _by_channel(graph, layer, array, axis, grid)
    block = block_size(math.prod(array.shape) // array.shape[axis], grid.block)
    return _by_channel(graph, layer, array, axis, W8) if block is None else _by_block(graph, layer, array, block, grid)


def block_size(columns: int, largest: int) -> int | None:
    """The largest size that divides the inputs of a channel; None if it is so small that scales outweigh weights."""
    block = max(size for size in range(1, largest + 1) if columns % size == 0)
    return None if block < _SMALLEST_BLOCK else block


def _by_channel(graph: ir.Graph, layer: Layer, array: Floats, axis: int, grid: Grid) -> ir.Value:
    others = tuple(i for i in range(array.ndim) if i != axis)
    scale = np.abs(array).max(axis=others, keepdims=True) / np.float32(grid.largest)
    scale[scale == 0.0] = 1.0
    name = layer.weight.name
    stored = _initializer(graph, f"{name}/{grid.name}", on_grid(array / scale, grid), grid.dtype)
    scales = _initializer(graph, f"{name}/scale", scale.reshape(-1))
    node = _node("DequantizeLinear", [stored, scales], f"{name}/dequantised", axis=axis)
    node.outputs[0].shape = ir.Shape(array.shape)
    graph.insert_before(layer.node, node)
    return node.outputs[0]


def _by_block(graph: ir.Graph, layer: Layer, array: Floats, block: int, grid: Grid) -> ir.Value:
    """Blocks along the inputs of a channel: (O, n) for a convolution, as it lies in memory; (n, O) or (O, n) else."""
    name, shape = layer.weight.name, array.shape
    flat = array.reshape(shape[0], -1) if layer.axis == 0 else array.reshape(-1, shape[-1])
    along = 1 if layer.axis == 0 else 0
    rows = flat if along == 1 else flat.T
    parts = rows.reshape(rows.shape[0], -1, block)
    scale = _best_scale(parts, grid)
    steps, scales = on_grid(parts / scale[..., None], grid).reshape(parts.shape[0], -1), scale
    if along == 0:
        steps, scales = np.ascontiguousarray(steps.T), np.ascontiguousarray(scales.T)
    stored = _initializer(graph, f"{name}/{grid.name}", steps, grid.dtype)
    factors = _initializer(graph, f"{name}/scale", scales)
    node = _node("DequantizeLinear", [stored, factors], f"{name}/flat", axis=along, block_size=block)
    node.outputs[0].shape = ir.Shape(flat.shape)
    graph.insert_before(layer.node, node)
    if flat.shape == shape:
        return node.outputs[0]
    sizes = _initializer(graph, f"{name}/shape", np.array(shape, np.int64))
    whole = _node("Reshape", [node.outputs[0], sizes], f"{name}/dequantised")
    whole.outputs[0].shape = ir.Shape(shape)
    graph.insert_before(layer.node, whole)
    return whole.outputs[0]


def _best_scale(parts: Floats, grid: Grid) -> Floats:
    """For each block (.., block) the scale of least squared error."""
    reach = np.abs(parts).max(axis=-1) / np.float32(grid.largest)
    reach[reach == 0.0] = 1.0
    best: Floats = reach
    error = np.full(reach.shape, np.inf)
    for shrink in SHRINK:
        scale = (reach * np.float32(shrink)).astype(np.float32)
        back = on_grid(parts / scale[..., None], grid).astype(np.float32) * scale[..., None]
        found = ((back - parts) ** 2).sum(axis=-1)
        best, error = np.where(found < error, scale, best), np.minimum(found, error)
    return best


def on_grid(array: Floats, grid: Grid) -> NDArray[np.generic]:
    """Clipped and rounded to nearest, ties to even."""
    clipped = np.clip(array, -grid.largest, grid.largest)
    steps: NDArray[np.generic] = (np.rint(clipped) if grid.whole else clipped).astype(grid.numpy)
    return steps


def _initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    kind = dtype if array.dtype != np.int64 else ir.DataType.INT64
    tensor = ir.tensor(array, dtype=kind, name=name)
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(
    op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: int
) -> ir.Node:
    node = ir.Node(
        "", op_type, inputs, attributes=[ir.AttrInt64(key, value) for key, value in attributes.items()], num_outputs=1
    )
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    return node
