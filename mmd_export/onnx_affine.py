"""What a group normalisation ends in, times gamma plus beta, in one pass over the image. onnx_ir, no torch.

ONNX has no node for it but BatchNormalization with a mean of 0 and a variance of 1, which on processors reads and
writes the image once instead of twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.onnx_nodes import Nodes, constant, of_channels, require_shapes


@dataclass(frozen=True)
class _Pair:
    """``add``, which alone reads what ``mul`` makes, and what they take for each channel, (C,)."""

    mul: ir.Node
    add: ir.Node
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


def scale_and_shift_at_once(model: ir.Model) -> int:
    """Rewrite such pairs of nodes in ``model`` and its subgraphs, float32; returns how many."""
    require_shapes(model)
    pairs = [pair for node in model.graph.all_nodes() if (pair := _pair(node)) is not None]
    for pair in pairs:
        _replace(model, pair)
    return len(pairs)


def _pair(add: ir.Node) -> _Pair | None:
    """The pair that ends in ``add``, if it is one."""
    scaled = add.inputs[0] if add.op_type == "Add" else None
    mul = None if scaled is None else scaled.producer()
    if scaled is None or mul is None or mul.op_type != "Mul" or len(scaled.uses()) != 1 or scaled.is_graph_output():
        return None
    scale, shift = (of_channels(node.inputs[1], node.inputs[0]) for node in (mul, add))
    return None if scale is None or shift is None else _Pair(mul, add, scale, shift)


def _replace(model: ir.Model, pair: _Pair) -> None:
    channels = len(pair.scale)
    given = [
        constant(model.graph, f"{source.name}/channels", array)
        for source, array in ((pair.mul.inputs[1], pair.scale), (pair.add.inputs[1], pair.shift))
        if source is not None
    ]
    mean = constant(model.graph, f"mean.{channels}", np.zeros(channels, np.float32))
    variance = constant(model.graph, f"variance.{channels}", np.ones(channels, np.float32))
    output, graph = pair.add.outputs[0], pair.add.graph
    assert output.shape is not None
    assert graph is not None
    nodes = Nodes(str(output.name))
    inputs = [pair.mul.inputs[0], *given, mean, variance]
    image = nodes.made("BatchNormalization", inputs, list(output.shape), {"epsilon": 0.0})
    ir.convenience.replace_nodes_and_values(graph, pair.add, [pair.mul, pair.add], nodes, [output], [image])
