"""The memory that the values of an ONNX graph need while it runs, from its shapes alone. onnx_ir, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from mmd_export.liveness import Operation, peak_bytes
from mmd_export.onnx_nodes import constant, lacks_shapes, require_shapes


def peak_activation_bytes(model: ir.Model, batch: int = 1) -> int:
    """The most bytes of values alive at once when nodes run in order and each value goes after its last use.

    Weights are not counted, nor what is computed from them alone, as a runtime does once, at loading. One that fuses
    nodes or works in place needs less, one that pads or blocks layouts more. A symbolic dimension of an input is
    ``batch``, and so is what cannot be inferred from it; a value whose shape cannot be inferred counts as nothing.
    """
    if lacks_shapes(model) or _has_symbols(model):
        model = model.clone()
        _fix_batch(model, batch)
        require_shapes(model)
    return _peak(model.graph, batch)


def _has_symbols(model: ir.Model) -> bool:
    return any(not _is_static(value) for graph in model.graphs() for value in _sized(graph))


def _fix_batch(model: ir.Model, batch: int) -> None:
    """Every symbol of the inputs becomes ``batch``; shapes with other symbols are dropped, to be inferred."""
    symbols = {size for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    for graph in model.graphs():
        for value in _sized(graph):
            if not _is_static(value):
                sizes = [batch if size in symbols else size for size in value.shape or ()]
                value.shape = ir.Shape(sizes) if all(isinstance(size, int) for size in sizes) else None
        if graph is not model.graph:
            _take_in_sizes(graph)


def _take_in_sizes(graph: ir.Graph) -> None:
    """Copy the integer weights that ``graph`` reads of the outer one; onnx 1.23 infers no shape from those."""
    for node in graph:
        for place, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.dtype != ir.DataType.INT64:
                continue
            if value.graph is not graph:
                node.replace_input_with(place, constant(graph, f"{value.name}/inside", value.const_value.numpy()))


def _sized(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _is_static(value: ir.Value) -> bool:
    return value.shape is None or all(isinstance(size, int) for size in value.shape)


def _peak(graph: ir.Graph, batch: int) -> int:
    fixed = fixed_values(graph)
    operations = [
        Operation(
            reads=_read(node),
            makes={} if fixed.issuperset(node.outputs) else {value: _bytes(value, batch) for value in node.outputs},
            inside=max((_peak(inner, batch) for inner in _subgraphs(node)), default=0),
        )
        for node in graph
    ]
    return peak_bytes({value: _bytes(value, batch) for value in graph.inputs}, operations, graph.outputs)


def fixed_values(graph: ir.Graph) -> set[ir.Value]:
    """What a runtime computes from the weights of ``graph`` alone; it keeps quantised ones as they are."""
    fixed: set[ir.Value] = set()
    for node in graph:
        known = [value for value in node.inputs if value is not None]
        if (
            node.op_type != "DequantizeLinear"
            and known
            and all(value.is_initializer() or value in fixed for value in known)
        ):
            fixed.update(node.outputs)
    return fixed


def _read(node: ir.Node) -> set[ir.Value]:
    """What a node reads, its inner graphs included."""
    inner = (each for subgraph in _subgraphs(node) for each in subgraph.all_nodes())
    return {value for reader in (node, *inner) for value in reader.inputs if value is not None}


def _subgraphs(node: ir.Node) -> Iterable[ir.Graph]:
    return (attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH)


def _bytes(value: ir.Value, batch: int) -> int:
    if value.shape is None or value.dtype is None:
        return 0
    sizes = [size if isinstance(size, int) else batch for size in value.shape]
    return math.ceil(math.prod(sizes) * value.dtype.itemsize)
