"""What a group normalisation ends in, times gamma plus beta, in one pass over the image. onnx_ir, no torch.

ONNX has no node for it but BatchNormalization with a mean of 0 and a variance of 1, which on processors reads and
writes the image once instead of twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mmd_export.onnx_nodes import Nodes, constant, of_channels, require_shapes


def scale_and_shift_at_once(model: ir.Model) -> int:
    """Rewrite such pairs of nodes in ``model`` and its subgraphs, float32; returns how many."""
    require_shapes(model)
    pairs = [pair for node in model.graph.all_nodes() if (pair := _pair(node)) is not None]
    for mul, add in pairs:
        _replace(model, mul, add)
    return len(pairs)


def _pair(add: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """``add`` with the multiplication that it alone reads, if both take a number for each channel."""
    scaled = add.inputs[0] if add.op_type == "Add" else None
    mul = None if scaled is None else scaled.producer()
    if scaled is None or mul is None or mul.op_type != "Mul" or len(scaled.uses()) != 1 or scaled.is_graph_output():
        return None
    return (mul, add) if all(of_channels(node.inputs[1], node.inputs[0]) is not None for node in (mul, add)) else None


def _replace(model: ir.Model, mul: ir.Node, add: ir.Node) -> None:
    def flat(node: ir.Node) -> ir.Value:
        image, source = node.inputs
        array = of_channels(source, image)
        assert source is not None
        assert array is not None
        return constant(model.graph, f"{source.name}/channels", array)

    scale, shift = flat(mul), flat(add)
    assert scale.shape is not None
    channels: Any = scale.shape[0]
    mean = constant(model.graph, f"mean.{channels}", np.zeros(channels, np.float32))
    variance = constant(model.graph, f"variance.{channels}", np.ones(channels, np.float32))
    output, graph = add.outputs[0], add.graph
    assert output.shape is not None
    assert graph is not None
    nodes = Nodes(str(output.name))
    inputs = [mul.inputs[0], scale, shift, mean, variance]
    image = nodes.made("BatchNormalization", inputs, list(output.shape), {"epsilon": 0.0})
    ir.convenience.replace_nodes_and_values(graph, add, [mul, add], nodes, [output], [image])
