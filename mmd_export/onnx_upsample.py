"""Convolutions behind a nearest-neighbour upsampling, done before it. onnx_ir, no torch.

A pixel doubled along both sides is read several times by a 3 x 3 window: of its nine pixels only four differ. Which
four, and the sums of weights that meet on each, depend on whether the output's row and column are even or odd. So four
2 x 2 convolutions of the small image, interleaved, are the large one with 4/9 of its products (the sub-pixel form of a
resize convolution: Aitken et al. 2017, arXiv 1707.02937).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.onnx_nodes import constant, sizes

FACTOR = 2
# What laying four images into one costs, in products of an image: 5 million saved, in the 16x16 model of
# benchmarks/speed.py, are no gain, 20 million and more, in the ddpm-cifar10 architecture, are one of 4 to 5 %.
LEAST_SAVED = 10_000_000
_WORDS = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_DEFAULTS = {
    "mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor",
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """``conv``, which alone reads what ``resize`` makes; ``weight`` (O, I, k, k) with k odd and a padding of k // 2."""

    resize: ir.Node
    conv: ir.Node
    weight: NDArray[np.float32]

    @property
    def saved(self) -> int:
        """How many products of an image fewer there will be."""
        (outer, inner, size, _), image = self.weight.shape, self.resize.inputs[0]
        assert image is not None
        assert image.shape is not None
        _, _, height, width = image.shape
        assert isinstance(height, int)
        assert isinstance(width, int)
        products: int = ((FACTOR * size) ** 2 - (size + 1) ** 2) * outer * inner * height * width
        return products


def convolve_before_upsampling(model: ir.Model) -> int:
    """Rewrite such pairs in ``model`` where that pays, float32; returns how many. Weights are summed in float64."""
    pairs = [pair for node in model.graph if (pair := _pair(node)) is not None and pair.saved >= LEAST_SAVED]
    for pair in pairs:
        _replace(model, pair)
    return len(pairs)


def _pair(conv: ir.Node) -> _Pair | None:
    """The pair that ends in ``conv``, if it is one."""
    if conv.op_type != "Conv":
        return None
    image, source = conv.inputs[:2]
    resize = None if image is None else image.producer()
    weight = None if source is None else source.const_value
    if resize is None or weight is None or weight.dtype != ir.DataType.FLOAT or not _doubles(resize):
        return None
    kernel = weight.shape.numpy()[2:]
    half = kernel[0] // 2
    if list(kernel) != [2 * half + 1] * 2 or half == 0 or _ints(conv, "pads") != [half] * 4:
        return None
    if any(_ints(conv, name) not in ([], [1, 1]) for name in ("strides", "dilations")):
        return None
    return _Pair(resize, conv, weight.numpy())


def _ints(node: ir.Node, name: str) -> list[int]:
    """An attribute; empty where it is left out."""
    return list(node.attributes[name].as_ints() if name in node.attributes else ())


def _doubles(node: ir.Node) -> bool:
    """Whether ``node`` writes every pixel of its input twice along both sides, for one reader."""
    output = node.outputs[0]
    if node.op_type != "Resize" or len(output.uses()) != 1 or output.is_graph_output():
        return False
    words = {name: node.attributes[name].as_string() for name in _WORDS if name in node.attributes}
    before = None if node.inputs[0] is None else node.inputs[0].shape
    after = output.shape
    if (
        {**_DEFAULTS, **words} != _WORDS
        or before is None
        or after is None
        or before.rank() != 4
        or before[1] != after[1]
    ):
        return False
    sizes = zip(before[2:], after[2:], strict=True)
    return all(isinstance(small, int) and large == FACTOR * small for small, large in sizes)


def _replace(model: ir.Model, pair: _Pair) -> None:
    """Four convolutions; their columns interleaved, then their rows."""
    parts = _Parts(model, pair)
    rows = []
    for p in range(FACTOR):
        columns = [parts.convolution((p, q)) for q in range(FACTOR)]
        channels, height, width = (int(size) for size in parts.of_part)
        apart = [parts.reshaped(column, (channels, height, width, 1)) for column in columns]
        rows.append(parts.reshaped(parts.joined(apart, 4), (channels, height, 1, FACTOR * width)))
    whole = parts.reshaped(parts.joined(rows, 3), (channels, FACTOR * height, FACTOR * width))
    output = pair.conv.outputs[0]
    ir.convenience.replace_nodes_and_values(
        model.graph, pair.conv, [pair.resize, pair.conv], parts.nodes, [output], [whole]
    )


class _Parts:
    """The nodes that stand for a pair, as they are made; values are named after what the pair gave."""

    def __init__(self, model: ir.Model, pair: _Pair) -> None:
        self.graph, self.pair = model.graph, pair
        self.nodes: list[ir.Node] = []
        image = pair.resize.inputs[0]
        assert image is not None
        assert image.shape is not None
        self.image = image
        self.of_part = (pair.weight.shape[0], *image.shape[2:])  # (O, H, W) of what one convolution gives
        self.name = pair.conv.outputs[0].name

    def convolution(self, phase: tuple[int, int]) -> ir.Value:
        """The output pixels of one phase, (N, O, H, W)."""
        kernel, pads = phase_kernel(self.pair.weight, phase)
        source, *bias = self.pair.conv.inputs[1:]
        assert source is not None
        group = self.pair.conv.attributes.get("group")
        attributes = {
            "kernel_shape": list(kernel.shape[2:]),
            "pads": pads,
            "group": 1 if group is None else group.as_int(),
        }
        weight = constant(self.graph, f"{source.name}/{phase[0]}{phase[1]}", kernel)
        return self._made("Conv", [self.image, weight, *bias], attributes)

    def joined(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """``values`` side by side."""
        return self._made("Concat", values, {"axis": axis})

    def reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """``value`` as (N, *shape)."""
        batch_as_before = 0
        return self._made("Reshape", [value, sizes(self.graph, (batch_as_before, *shape))], {})

    def _made(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        value = node.outputs[0]
        value.name = f"{self.name}/{len(self.nodes)}"
        value.type = self.pair.conv.outputs[0].type
        self.nodes.append(node)
        return value


def phase_kernel(weight: NDArray[np.float32], phase: tuple[int, int]) -> tuple[NDArray[np.float32], list[int]]:
    """The kernel of the output pixels with this remainder by 2 along rows and columns, and its ONNX ``pads``.

    ``weight`` is (O, I, k, k). Output row 2 i + p reads the large image's rows 2 i + p + a - k // 2, which are rows
    i + floor((p + a - k // 2) / 2) of the small one.
    """
    size = weight.shape[2]
    rows = [[(p + a - size // 2) // FACTOR for a in range(size)] for p in phase]
    first, last = [row[0] for row in rows], [row[-1] for row in rows]
    counts = [after - before + 1 for before, after in zip(first, last, strict=True)]
    kernel = np.zeros((*weight.shape[:2], *counts))
    for a, b in itertools.product(range(size), repeat=2):
        kernel[:, :, rows[0][a] - first[0], rows[1][b] - first[1]] += weight[:, :, a, b]
    return kernel.astype(np.float32), [*(-before for before in first), *last]
