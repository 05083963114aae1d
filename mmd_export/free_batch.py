"""What a captured call of a free batch size needs beyond what torch.export gives: sizes that follow the batch."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_SPLITS = (
    _ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.tensor_split.sections,
)  # fmt: skip


def free_sizes(node: fx.Node) -> list[int]:
    """The dimensions of its value that follow the batch; none of what is no tensor."""
    shape: Any = getattr(node.meta.get("val"), "shape", ())
    return [dim for dim, size in enumerate(shape) if not isinstance(size, int)]


def in_batches(node: fx.Node, x: fx.Node) -> bool:
    """Whether all sizes that follow the batch are multiples of that of ``x``."""
    return _known(_factors(node, x))


def _factors(node: fx.Node, x: fx.Node) -> list[int | None]:
    return [_factor(node.meta["val"].shape[dim], x) for dim in free_sizes(node)]


def repeat_rows(graph: fx.Graph, x: fx.Node, rows: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Each of ``rows``, 1 long where the size of its key follows the batch, expanded to the batch of ``x``.

    A key without such a size is left out. All are ``in_batches``.
    """
    repeated = {}
    for node, row in rows.items():
        factors = _factors(node, x)
        assert _known(factors)
        if factors:
            sizes: list[int | fx.Node] = [*node.meta["val"].shape]
            for dim, factor in zip(free_sizes(node), factors, strict=True):
                sizes[dim] = _times(graph, x, factor)
            expanded = graph.call_function(_ATEN.expand.default, (row, sizes))
            # contiguous: every view of it is possible then, of an expanded one not
            layout: dict[str, fx.node.Argument] = {"memory_format": torch.contiguous_format}
            repeated[node] = graph.call_function(_ATEN.clone.default, (expanded,), layout)
    return repeated


def row_is_enough(node: fx.Node, rows: Container[fx.Node]) -> bool:
    """Whether ``node`` computes the same with ``rows`` of 1 in place of a batch: another operand has all its sizes."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    others = [parent.meta.get("val") for parent in node.all_input_nodes if parent not in rows]
    return str(node.meta["val"].shape) in {str(value.shape) for value in others if isinstance(value, Tensor)}


def slice_splits(graph: fx.Graph, x: fx.Node) -> None:
    """chunk and split along the batch, as of the two halves of guidance inside a network, become slices.

    torch.onnx 2.13 makes a sequence of the parts. onnxscript 0.7.2 fails at it (optimizer/_constant_folding.py,
    split_to_sequence, where no size is known), and TensorRT takes no sequence. Delete when torch.onnx makes a Split.
    """
    for node in [each for each in graph.nodes if each.target in _SPLITS]:
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
