"""3 x 3 convolutions by minimal filtering along the rows, for processors. onnx_ir, no torch.

``m`` neighbouring rows of a 3 x 3 convolution take ``3 m`` products of a row with a row of weights; the minimal
filtering algorithm F(m, 3) takes ``m + 2`` (Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308), F(4, 3) half:

    y = A^T [(G g) * (B^T d)]

for ``m + 2`` rows ``d`` of the image and 3 rows ``g`` of weights. Only rows are transformed, so the products are a
convolution again, with a 1 x 3 kernel and a group for each, and ``B^T`` is depthwise convolutions: onnxruntime and
OpenVINO keep both in the blocked layout of their convolutions. ``A^T`` is a small matrix product. ``G g`` is computed
in the graph from the weight as it was, which onnxruntime does once, when it loads the graph (constant folding), so the
file does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.onnx_nodes import Nodes, array_of, constant, of_channels, require_shapes, sizes

KERNEL = 3
# Of channels: what the blocked layouts of onnxruntime and OpenVINO hold side by side, with AVX-512 or less.
BLOCK = 16
# Of an image. Below, most layers gain little on two threads: starting more nodes takes what they save
# (benchmarks/results/winograd.json).
LEAST_PRODUCTS = 60_000_000
PAIRS = (1.0, 0.5)  # points +p and -p where polynomials are evaluated, beside 0 and infinity
ROWS = (2 * len(PAIRS), 2)
# Attributes of a convolution: what is meant where one is left out, and what is wanted.
_PLAIN = {"pads": ([0] * 4, [1] * 4), "strides": ([1] * 2, [1] * 2), "dilations": ([1] * 2, [1] * 2)}


@dataclass(frozen=True)
class Filtering:
    """F(m, 3); its ``m + 2`` points are 0, then +p and -p of each pair, then infinity."""

    of_output: NDArray[np.float64]  # A^T (m, m + 2)
    of_kernel: NDArray[np.float64]  # G (m + 2, 3)
    of_image: NDArray[np.float64]  # B^T (m + 2, m + 2)


@cache
def filtering(rows: int) -> Filtering:
    """F(``rows``, 3), ``rows`` even, by Toom and Cook's interpolation of polynomials, transposed."""
    points = [0.0, *itertools.chain.from_iterable((p, -p) for p in PAIRS[: rows // 2])]
    others = [[q for q in points if q != p] for p in points]
    of_image = np.zeros((rows + 2, rows + 2))
    for i, roots in enumerate([*others, points]):
        of_image[i, : len(roots) + 1] = np.poly(np.array(roots))[::-1]
    scales = [math.prod(p - q for q in roots) for p, roots in zip(points, others, strict=True)]
    of_output = [[*(p**j for p in points), float(j == rows - 1)] for j in range(rows)]
    of_kernel = [[p**a / scale for a in range(KERNEL)] for p, scale in zip(points, scales, strict=True)]
    return Filtering(np.array(of_output), np.array([*of_kernel, [0.0, 0.0, 1.0]]), of_image)


@dataclass(frozen=True)
class _Layer:
    """A convolution to be split: its node, the node whose output it becomes, its shapes, and m."""

    conv: ir.Node
    last: ir.Node  # the addition of a constant to each channel, where one follows; else ``conv``
    bias: NDArray[np.float32]  # (O,), of both
    channels: int
    outputs: int
    height: int
    width: int

    @property
    def products(self) -> int:
        """Of one image."""
        return KERNEL**2 * self.channels * self.outputs * self.height * self.width

    @property
    def rows(self) -> int | None:
        """The largest m that leaves two groups of rows or more."""
        return next((rows for rows in ROWS if self.height % rows == 0 and self.height >= 2 * rows), None)


def filter_rows(model: ir.Model) -> int:
    """Split the convolutions of ``model``, float32, where that pays; returns how many. Subgraphs are split too."""
    require_shapes(model)
    layers = [layer for node in model.graph.all_nodes() if (layer := _layer(node)) is not None]
    kernels = _Kernels(model.graph)
    for layer in layers:
        _Split(kernels, layer).replace()
    return len(layers)


def _layer(conv: ir.Node) -> _Layer | None:
    """The layer of ``conv``, if it can be split and is large enough."""
    if conv.op_type != "Conv" or not _is_plain(conv):
        return None
    image, weight, bias = (*conv.inputs, None)[:3]
    kernel = array_of(weight)
    if image is None or image.shape is None or kernel is None or kernel.dtype != np.float32:
        return None
    own = np.zeros(len(kernel), np.float32) if bias is None else array_of(bias)
    outputs, inner, *_ = kernel.shape
    _, channels, height, width = image.shape
    if inner != channels or inner % BLOCK or outputs % BLOCK or own is None:
        return None
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    last, added = _constant_added(conv) or (conv, np.float32(0))
    layer = _Layer(conv, last, own + added, inner, outputs, height, width)
    return layer if layer.rows is not None and layer.products >= LEAST_PRODUCTS else None


def _is_plain(conv: ir.Node) -> bool:
    """Whether it is a 3 x 3 convolution that keeps the size of the image."""
    weight = conv.inputs[1]
    shape = () if weight is None or weight.shape is None else tuple(weight.shape)
    return shape[2:] == (KERNEL, KERNEL) and all(
        list(conv.attributes[name].as_ints() if name in conv.attributes else default) == wanted
        for name, (default, wanted) in _PLAIN.items()
    )


def _constant_added(conv: ir.Node) -> tuple[ir.Node, NDArray[np.float32]] | None:
    """The one reader of ``conv`` if it adds a constant to each channel, as it does with the time; and that constant."""
    output = conv.outputs[0]
    if output.is_graph_output() or len(output.uses()) != 1:
        return None
    (reader, _), *_ = output.uses()
    others = [value for value in reader.inputs if value is not output]
    if reader.op_type != "Add" or len(others) != 1 or (added := of_channels(others[0], output)) is None:
        return None
    return reader, added


class _Kernels:
    """Transformed weights, each once a model."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.transformed: dict[tuple[str, int], ir.Value] = {}

    def of(self, weight: ir.Value, rows: int) -> ir.Value:
        """``G`` times ``weight`` (O, C, 3, 3): one kernel a product, ((m + 2) O, C, 1, 3), computed in the graph."""
        key = str(weight.name), rows
        if key not in self.transformed:
            assert weight.const_value is not None
            outputs, channels, *_ = weight.const_value.shape.numpy()
            matrix, name = filtering(rows).of_kernel.astype(np.float32), f"{weight.name}/winograd.{rows}"
            count, shape = len(matrix), (len(matrix) * outputs, channels, 1, KERNEL)
            nodes = Nodes(name)
            of_kernel = constant(self.graph, f"winograd.{rows}", matrix)
            product = nodes.made("MatMul", [of_kernel, weight], (outputs, channels, count, KERNEL))
            first = nodes.made("Transpose", [product], (count, outputs, channels, KERNEL), {"perm": [2, 0, 1, 3]})
            self.transformed[key] = nodes.made("Reshape", [first, sizes(self.graph, shape)], shape)
            self.graph.insert_before(self.graph[0], nodes)
        return self.transformed[key]


class _Split:
    """The nodes that stand for a layer."""

    def __init__(self, kernels: _Kernels, layer: _Layer) -> None:
        assert layer.rows is not None
        self.kernels, self.layer, self.rows = kernels, layer, layer.rows
        self.products = layer.rows + KERNEL - 1
        self.output = layer.last.outputs[0]
        self.nodes = Nodes(f"{self.output.name}/winograd")
        assert self.output.shape is not None
        self.batch = self.output.shape[0]
        self.part = layer.height // self.rows, layer.width  # (H / m, W)

    def replace(self) -> None:
        """Put the nodes in the place of the layer."""
        layer = self.layer
        image = self._image(self._products())
        graph = layer.conv.graph
        assert graph is not None
        old = [layer.conv] if layer.last is layer.conv else [layer.conv, layer.last]
        ir.convenience.replace_nodes_and_values(graph, layer.last, old, self.nodes, [self.output], [image])

    def _products(self) -> ir.Value:
        """(G g) * (B^T d): (N, (m + 2) O, H / m, W), one convolution with a group for each product."""
        layer, count = self.layer, self.products
        weight = layer.conv.inputs[1]
        assert weight is not None
        transformed = [self._transformed(i) for i in range(count)]
        side_by_side = self.nodes.made(
            "Concat", transformed, (self.batch, count * layer.channels, *self.part), {"axis": 1}
        )
        inputs = [side_by_side, self.kernels.of(weight, self.rows), self._bias()]
        attributes = {"kernel_shape": [1, KERNEL], "pads": [0, 1, 0, 1], "group": count}
        return self.nodes.made("Conv", inputs, (self.batch, count * layer.outputs, *self.part), attributes)

    def _transformed(self, i: int) -> ir.Value:
        """Row i of B^T d, (N, C, H / m, W); row 0 of ``d`` is the one above every m rows."""
        above = 1
        taps = filtering(self.rows).of_image[i]
        first, last = (int(place) for place in np.flatnonzero(taps)[[0, -1]])
        start, channels = min(first, above), self.layer.channels
        kernel = np.tile(taps[start : last + 1].astype(np.float32)[:, None], (channels, 1, 1, 1))
        weight = constant(self.kernels.graph, f"winograd.{self.rows}.{i}/{channels}", kernel)
        attributes = {
            "kernel_shape": list(kernel.shape[2:]),
            "strides": [self.rows, 1],
            "pads": [above - start, 0, max(0, last - self.rows), 0],
            "group": channels,
        }
        return self.nodes.made(
            "Conv", [self.layer.conv.inputs[0], weight], (self.batch, channels, *self.part), attributes
        )

    def _bias(self) -> ir.Value:
        """What the layer adds to each channel, with the product of the point 1: A^T brings that to every row."""
        bias = np.zeros((self.products, self.layer.outputs), np.float32)
        bias[1] = self.layer.bias
        return constant(self.kernels.graph, f"{self.output.name}/bias", bias.reshape(-1))

    def _image(self, products: ir.Value) -> ir.Value:
        """A^T times the products, and their rows in order: (N, O, H, W)."""
        outputs, (height, width) = self.layer.outputs, self.part
        matrix = constant(
            self.kernels.graph, f"winograd.{self.rows}.output", filtering(self.rows).of_output.astype(np.float32)
        )
        apart = self._reshaped(products, (self.products, outputs * height * width))
        rows = self.nodes.made("MatMul", [matrix, apart], (self.batch, self.rows, outputs * height * width))
        of_rows = self._reshaped(rows, (self.rows, outputs, height, width))
        perm = [0, 2, 3, 1, 4]
        in_order = self.nodes.made(
            "Transpose", [of_rows], (self.batch, outputs, height, self.rows, width), {"perm": perm}
        )
        return self._reshaped(in_order, (outputs, self.rows * height, width))

    def _reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """``value`` as (N, *shape)."""
        batch_as_before = 0
        whole = sizes(self.kernels.graph, (batch_as_before, *shape))
        return self.nodes.made("Reshape", [value, whole], (self.batch, *shape))
