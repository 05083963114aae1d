"""What a captured call of a free batch size needs beyond what torch.export gives: sizes that follow the batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_IN_PARTS = (
    _ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.tensor_split.sections,
)  # fmt: skip


def repeat_rows(graph: fx.Graph, x: fx.Node, stored: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """What ``stored`` holds of one image, by the node that had it of all, repeated for as many as ``x`` has.

    For operators that do not broadcast; only of nodes whose size follows the batch of ``x``.
    """
    repeated = {}
    for node, copy in stored.items():
        shape = node.meta["val"].shape
        factors = {i: _factor(size, x) for i, size in enumerate(shape) if not isinstance(size, int)}
        if factors and None not in factors.values():
            sizes = [_times(graph, x, factors[i] or 0) if i in factors else size for i, size in enumerate(shape)]
            repeated[node] = graph.call_function(_ATEN.expand.default, (copy, sizes))
    return repeated


def broadcasts(node: fx.Node) -> bool:
    """Whether one row of an operand serves for all rows of another."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def slice_parts(graph: fx.Graph, x: fx.Node) -> None:
    """Parts of what follows the batch of ``x``, as the two halves of guidance inside a network, become slices.

    torch.onnx 2.13 makes a sequence of them, at which onnxscript 0.7.2 fails (optimizer/_constant_folding.py,
    split_to_sequence, where no size is known) and which TensorRT does not take. Delete when Split comes out.
    """
    for node in [each for each in graph.nodes if each.target in _IN_PARTS]:
        dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)  # the same place in all of them
        parts: Sequence[Tensor] = node.meta["val"]
        factors = [_factor(part.shape[dim], x) for part in parts]
        if not _known(factors):
            continue
        ends = list(accumulate(factors, initial=0))
        for user in list(node.users):
            part = int(user.args[1])  # operator.getitem: nothing else takes a list of parts apart
            with graph.inserting_before(user):
                bounds = [_times(graph, x, end) for end in ends[part : part + 2]]
                piece = graph.call_function(_ATEN.slice.Tensor, (node.args[0], dim, *bounds))
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)


def _factor(size: int | torch.SymInt, x: fx.Node) -> int | None:
    """How many times the batch of ``x`` it is, or None if that is not certain."""
    batch = x.meta["val"].shape[0]
    if isinstance(size, int) or isinstance(batch, int):
        return None
    ratio = size.node.expr / batch.node.expr
    return int(ratio) if ratio.is_Integer else None


def _known(factors: Sequence[int | None]) -> TypeGuard[Sequence[int]]:
    return None not in factors


def _times(graph: fx.Graph, x: fx.Node, factor: int) -> int | fx.Node:
    """``factor`` times the batch of ``x``, in the graph."""
    if factor == 0:
        return 0
    images = graph.call_function(_ATEN.sym_size.int, (x, 0))
    return images if factor == 1 else graph.call_function(operator.mul, (images, factor))
