"""New constants and float32 nodes of an ONNX graph that is rewritten. onnx_ir, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

PRODUCTS = ("MatMul", "Gemm")  # whose second input is a matrix of weights


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """The initialiser ``name`` of ``graph``; made of ``array`` if there is none."""
    if (known := graph.initializers.get(name)) is not None:
        return known
    tensor = ir.tensor(array, name=name)
    shape = ir.Shape(array.shape)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def sizes(graph: ir.Graph, shape: Sequence[int]) -> ir.Value:
    """``shape`` as what a Reshape takes; equal ones are one initialiser."""
    return constant(graph, f"shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))


def weights_of(model: ir.Model) -> list[ir.Value]:
    """Every initialiser, those of subgraphs too."""
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of a weight; None for what is computed, or absent."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def of_channels(value: ir.Value | None, image: ir.Value | None) -> NDArray[np.float32] | None:
    """The constant ``value`` as (C,), if it is one float32 number for each channel of ``image`` (N, C, ...)."""
    array = array_of(value)
    if image is None or image.shape is None or array is None or array.dtype != np.float32:
        return None
    channels = image.shape[1] if image.shape.rank() > 1 else None
    shape = (channels, *[1] * (image.shape.rank() - 2))
    return array.reshape(-1) if array.shape in (shape, (1, *shape)) else None


class Nodes(list[ir.Node]):
    """Nodes as they are made, each with one float32 output that is named ``name`` and a number."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def made(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int | ir.SymbolicDim],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """The output of another node, of ``shape``."""
        name = f"{self.name}.{len(self)}"
        node = ir.node(op_type, inputs, attributes, name=f"{name}/{op_type}")
        value = node.outputs[0]
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.append(node)
        return value


def lacks_shapes(model: ir.Model) -> bool:
    """Whether a node's output has none."""
    return any(value.shape is None for node in model.graph.all_nodes() for value in node.outputs)


def require_shapes(model: ir.Model) -> None:
    """Infer what shapes are missing."""
    from onnx_ir.passes.common import ShapeInferencePass

    if lacks_shapes(model):
        ShapeInferencePass(strict_mode=False)(model)
