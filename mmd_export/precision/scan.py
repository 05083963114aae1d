"""How large every value of a call becomes on the real trajectory, and every sum inside its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.errors import UsageError
from mmd_export.precision.trajectory import Calls, follow

SUMS = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
_MAX, _SUM, _TOTAL = "scan.max", "scan.sum", "scan.total"


@dataclass
class Scan:
    """Largest magnitudes over all calls and images, by the name of a value.

    ``partial[y]`` bounds every partial sum on the way to ``y``, in whatever order it is added: sum |a b| + |c|.
    """

    largest: dict[str, float] = field(default_factory=dict)
    partial: dict[str, float] = field(default_factory=dict)

    def watch(self, k: int, seen: Mapping[str, NDArray[Any]]) -> None:
        """Take in one call; raises UsageError for the first value that is NaN."""
        for name, array in seen.items():
            kind, value = name.split("/", 1)
            if kind == _TOTAL:  # a maximum may pass over NaN, a sum does not
                if np.isnan(array):
                    raise UsageError(f"value {value!r} is NaN in call {k} of the float32 network; check its weights")
                continue
            found = self.largest if kind == _MAX else self.partial
            found[value] = max(found.get(value, 0.0), float(array))


def scan(calls: Calls, images: int) -> Scan:
    """Follow ``images`` images through all K calls."""
    found = Scan()
    follow(calls, _with_maxima(calls.model), images, found.watch)
    for name, value in calls.model.graph.initializers.items():
        if is_float(value) and value.const_value is not None and value.const_value.size:
            found.largest[name] = float(np.abs(value.const_value.numpy()).max())
    return found


def is_float(value: ir.Value | None) -> bool:
    """Whether it is float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def _with_maxima(model: ir.Model) -> ir.Model:
    """The call with a scalar output for every float32 value and every product."""
    watched = model.clone()
    graph = watched.graph
    nodes = list(graph)
    for value in [*graph.inputs, *(output for node in nodes for output in node.outputs)]:
        if is_float(value):
            magnitude = _add(graph, "Abs", [value])
            _watch(graph, "ReduceMax", magnitude, f"{_MAX}/{value.name}")
            _watch(graph, "ReduceSum", magnitude, f"{_TOTAL}/{value.name}")
    for node in nodes:
        if node.op_type in SUMS and is_float(node.outputs[0]):
            inputs = [_add(graph, "Abs", [value]) if is_float(value) else value for value in node.inputs]
            attributes = list(node.attributes.values())
            bound = _add(graph, node.op_type, inputs, attributes)
            _watch(graph, "ReduceMax", bound, f"{_SUM}/{node.outputs[0].name}")
    return watched


def _add(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()
) -> ir.Value:
    node = ir.Node("", op_type, inputs, attributes=attributes, num_outputs=1)
    graph.append(node)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[0]


def _watch(graph: ir.Graph, op_type: str, value: ir.Value, name: str) -> None:
    """One scalar output."""
    result = _add(graph, op_type, [value], [ir.AttrInt64("keepdims", 0)])
    result.name, result.shape = name, ir.Shape(())
    graph.outputs.append(result)
