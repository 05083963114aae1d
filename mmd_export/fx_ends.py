"""``mmd_export.ends`` of a graph of torch."""

from __future__ import annotations

import torch
from torch import fx

from mmd_export.ends import giving, reading

_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm")
}


def fx_ends(network: set[fx.Node], outside: set[fx.Node]) -> set[fx.Node]:
    """The nodes of ``network`` at its ends; ``outside``: the nodes that give the state, and that read the output."""

    def after(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.users if each in network]

    def before(node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each in network]

    def is_sum(node: fx.Node) -> bool:
        """What is made of weights alone, such as a reshaped bias, is read by nothing that was computed."""
        computed = [each for each in before(node) if before(each)]
        return node.target is torch.ops.aten.add.Tensor and len(computed) > 1

    first = [node for node in network if not outside.isdisjoint(node.all_input_nodes)]
    last = [node for node in network if not outside.isdisjoint(node.users)]
    return reading(first, after, _is_product) | giving(last, before, _is_product, is_sum)


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS
