"""A 16-bit graph run without 16-bit kernels: float32 arithmetic, every result rounded to the format.

That is what a device computes that adds up in float32 and stores in 16 bits, as tensor cores do. onnxruntime's CPU
provider needs it for bf16, for which it has no kernels, and for an honest fp16: it joins fp16 nodes in float32 and
drops the roundings between them.
"""

from __future__ import annotations

import onnx_ir as ir

from mmd_export.precision.formats import Half


def emulated(model: ir.Model, half: Half) -> ir.Model:
    """A copy of ``model`` with float32 in place of ``half`` and a rounding behind each node that gave it."""
    copy = model.clone()
    graph = copy.graph
    for value in graph.initializers.values():
        if value.dtype == half.dtype:
            assert value.const_value is not None
            exact = value.const_value.numpy().astype("float32")
            value.const_value, value.type = ir.tensor(exact, name=value.name), ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") == half.dtype:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for value in node.outputs:
            if value.dtype == half.dtype:
                _round(graph, node, value, half)
    return copy


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, half: Half) -> None:
    """All that read ``value`` read it rounded; the rounded one has its name."""
    name = value.name
    value.type = ir.TensorType(ir.DataType.FLOAT)
    uses = list(value.uses())
    down = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", half.dtype)], num_outputs=1)
    up = ir.Node("", "Cast", [down.outputs[0]], attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)], num_outputs=1)
    for result, dtype in ((down.outputs[0], half.dtype), (up.outputs[0], ir.DataType.FLOAT)):
        result.name, result.type = f"{name}/{dtype.name.lower()}.rounded", ir.TensorType(dtype)
        result.shape = value.shape
    value.name, up.outputs[0].name = f"{name}/exact", name
    graph.insert_after(node, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, up.outputs[0])
