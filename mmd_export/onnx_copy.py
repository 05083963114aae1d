"""Copies of one ONNX graph inside another: new nodes and value names, shared initialisers. onnx_ir, no torch."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def copy_nodes(
    graph: ir.Graph, given: Sequence[ir.Value], prefix: str, initializers: dict[str, ir.Value], weights: str = ""
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of ``graph`` on other inputs, and its one output; names of nodes and values start with ``prefix``.

    Its weights join ``initializers``, their names behind ``weights``: all copies of one graph share them.
    """
    values: dict[ir.Value | None, ir.Value | None] = {None: None}
    values |= dict(zip(graph.inputs, given, strict=True))
    for name, value in graph.initializers.items():
        weight = ir.Value(name=f"{weights}{name}", type=value.type, shape=value.shape, const_value=value.const_value)
        values[value] = initializers.setdefault(f"{weights}{name}", weight)
    nodes = []
    for index, node in enumerate(graph):
        copy = ir.Node(
            node.domain,
            node.op_type,
            [values[value] for value in node.inputs],
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{prefix}{index}.{node.op_type}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"{prefix}{old.name}", old.type
            if old.shape is not None and old.shape.is_static():  # the checker and the report need not infer it again
                new.shape = old.shape
            values[old] = new
        nodes.append(copy)
    output = values[graph.outputs[0]]
    assert output is not None
    return nodes, output
