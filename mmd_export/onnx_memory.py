"""The memory that the values of an ONNX graph need while it runs, from its shapes alone. onnx_ir, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from mmd_export.onnx_nodes import lacks_shapes, require_shapes


def peak_activation_bytes(model: ir.Model, batch: int = 1) -> int:
    """The most bytes of values alive at once when nodes run in order and each value goes after its last use.

    Weights are not counted, nor what is computed from them alone, as a runtime does once, at loading. One that fuses
    nodes or works in place needs less, one that pads or blocks layouts more. A symbolic dimension counts as ``batch``;
    a value whose shape cannot be inferred counts as nothing.
    """
    if lacks_shapes(model):
        model = model.clone()
        require_shapes(model)
    return _peak(model.graph, batch)


def _peak(graph: ir.Graph, batch: int) -> int:
    last, fixed = _last_uses(graph), fixed_values(graph)
    alive = {value: _bytes(value, batch) for value in graph.inputs}
    peak = sum(alive.values())
    for place, node in enumerate(graph):
        if fixed.issuperset(node.outputs):
            continue
        alive |= {value: _bytes(value, batch) for value in node.outputs}
        inside = max((_peak(inner, batch) for inner in _subgraphs(node)), default=0)
        peak = max(peak, sum(alive.values()) + inside)
        alive = {value: size for value, size in alive.items() if last.get(value, place) != place}
    return peak


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


def _last_uses(graph: ir.Graph) -> dict[ir.Value, int]:
    """The place of the last node that reads each value, inner graphs included; outputs are never done with."""
    last: dict[ir.Value, int] = {}
    for place, node in enumerate(graph):
        inner = [each for subgraph in _subgraphs(node) for each in subgraph.all_nodes()]
        for reader in (node, *inner):
            last |= {value: place for value in reader.inputs if value is not None}
    return last | dict.fromkeys(graph.outputs, -1)


def _subgraphs(node: ir.Node) -> Iterable[ir.Graph]:
    return (attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH)


def _bytes(value: ir.Value, batch: int) -> int:
    if value.shape is None or value.dtype is None:
        return 0
    sizes = [size if isinstance(size, int) else batch for size in value.shape]
    return math.ceil(math.prod(sizes) * value.dtype.itemsize)
