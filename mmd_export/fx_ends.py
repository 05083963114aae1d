"""``mmd_export.ends`` of a graph of torch."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mmd_export.ends import giving, phases, reading

_aten = torch.ops.aten
_SINUSOIDS = {_aten.sin.default, _aten.cos.default}
# What ``mmd_export.precision.islands`` takes for a product in ONNX, where attention ends in one.
_PRODUCTS = {
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default,
    _aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
    _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.addmm.default,
    _aten.scaled_dot_product_attention.default,
}  # fmt: skip


def fx_ends(network: set[fx.Node], outside: set[fx.Node]) -> set[fx.Node]:
    """The nodes of ``network`` at its ends; ``outside``: the nodes that give the state, and that read the output.

    Sizes are left out: what reads the size of the state need not read the state.
    """
    floats = {node for node in network if _is_of_floats(node)}

    def after(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.users if each in floats]

    def before(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each in floats]

    first = [node for node in floats if not outside.isdisjoint(node.all_input_nodes)]
    last = [node for node in floats if not outside.isdisjoint(node.users)]

    def is_sum(node: fx.Node) -> bool:
        """A weight, and what is made of weights alone such as a reshaped bias, was not computed."""
        added = [each for each in before(node) if before(each) or not outside.isdisjoint(each.all_input_nodes)]
        return node.target is _aten.add.Tensor and len(added) > 1

    return reading(first, after, _is_product) | giving(last, before, _is_product, is_sum)


def fx_phases(graph: fx.Graph, state: fx.Node) -> set[fx.Node]:
    """The sinusoids of what does not depend on the node ``state``, and what they are made of."""

    def after(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.users if _is_of_floats(each)]

    def before(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if _is_of_floats(each)]

    return phases([state], after, before, [node for node in graph.nodes if node.target in _SINUSOIDS])


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS


def _is_of_floats(node: fx.Node) -> bool:
    values = node.meta.get("val")
    several = values if isinstance(values, list | tuple) else (values,)  # of a split
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in several)
