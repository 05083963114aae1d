"""A float32 call turned into one of 16 bits, with islands of float32: casts where the two meet, weights stored once.

No existing converter fits. onnxruntime.transformers.float16 (1.32) puts casts behind the nodes that read them, what
onnx.checker refuses, and leaves operations out by name, whatever their range. ModelOpt's AutoCast does scan ranges, of
a whole model on given inputs, and brings a CUDA stack along. This one types a node by its ONNX schema, and scans one
call on the trajectory of all K steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mmd_export.precision.formats import Half
from mmd_export.precision.islands import INDIFFERENT, signature
from mmd_export.precision.scan import is_float
from mmd_export.precision.trajectory import Calls, Rows

_COPIED = 1024  # a weight of at most so many numbers that both sides read is stored in both types, not cast


def to_half(calls: Calls, kept: Mapping[ir.Node, str], half: Half) -> Calls:
    """The calls with every node of ``calls.model`` in ``half`` but those ``kept``; the model is changed in place."""
    conversion = _Conversion(calls.model, kept, half)
    flags = [conversion.input_in_half(value) for value in calls.constant_inputs]
    conversion.run()
    rows: Rows = [
        [half.round(array) if flag else array for array, flag in zip(row, flags, strict=True)]
        for row in calls.constants
    ]
    calls.model.graph.opset_imports[""] = max(calls.model.graph.opset_imports[""], half.opset)
    return Calls(calls.model, rows, calls.plan, calls.shape, calls.batch, calls.conditions)


class _Conversion:
    """Types are decided for nodes; a value has that of its producer, and a cast where a reader wants the other."""

    def __init__(self, model: ir.Model, kept: Mapping[ir.Node, str], half: Half) -> None:
        self.graph, self.half = model.graph, half
        # Types change as it goes, so what was float32 is noted first.
        self.readers: dict[ir.Value, set[bool]] = {}
        self.plan: list[tuple[ir.Node, bool, list[int], list[ir.Value]]] = []
        for node in model.graph:
            in_half = node not in kept
            inputs = [i for i, value in enumerate(node.inputs) if is_float(value)]
            outputs = [value for value in node.outputs if is_float(value)]
            self.plan.append((node, in_half, inputs, outputs))
            for i in inputs if node.op_type not in INDIFFERENT else ():
                value = node.inputs[i]
                assert value is not None
                self.readers.setdefault(value, set()).add(self._wants_half(node, i, in_half))
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def _wants_half(self, node: ir.Node, i: int, in_half: bool) -> bool:
        return in_half and i not in signature(node, self.half).fixed

    def input_in_half(self, value: ir.Value) -> bool:
        """Make an input 16 bits wide if all its readers want that; says whether it did."""
        if not is_float(value) or self.readers.get(value) != {True}:
            return False
        value.type = ir.TensorType(self.half.dtype)
        return True

    def run(self) -> None:
        for weight in list(self.graph.initializers.values()):
            if is_float(weight):
                self._store(weight)
        for node, in_half, inputs, outputs in self.plan:
            if node.op_type in INDIFFERENT:
                continue
            for i in inputs:
                self._feed(node, i, in_half)
            for value in outputs if in_half else ():
                value.type = ir.TensorType(self.half.dtype)
            if node.op_type == "Cast" and in_half and outputs:
                node.attributes["to"] = ir.AttrInt64("to", self.half.dtype)
        for i, value in enumerate(self.graph.outputs):
            if value.dtype == self.half.dtype:
                self.graph.outputs[i] = self._cast(value, ir.DataType.FLOAT, None)

    def _feed(self, node: ir.Node, i: int, in_half: bool) -> None:
        """Input ``i`` in the type that the node wants."""
        value = node.inputs[i]
        assert value is not None
        wanted = self.half.dtype if self._wants_half(node, i, in_half) else ir.DataType.FLOAT
        if value.dtype != wanted:
            node.replace_input_with(i, self._cast(value, wanted, node))

    def _store(self, value: ir.Value) -> None:
        """A weight in the type that its readers want; float32 too if both do and it is small."""
        tensor, readers = value.const_value, self.readers.get(value, set())
        assert tensor is not None
        if True not in readers:
            return
        array = tensor.numpy()
        if False in readers and array.size <= _COPIED:
            copy = ir.tensor(array, name=f"{value.name}/float32")
            both = ir.Value(name=copy.name, type=value.type, shape=value.shape, const_value=copy)
            self.graph.register_initializer(both)
            self.casts[value, ir.DataType.FLOAT] = both
        value.const_value = ir.tensor(self.half.round(array), dtype=self.half.dtype, name=value.name)
        value.type = ir.TensorType(self.half.dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        """``value`` in ``dtype``, cast once for all its readers: before the first of them, or at the end."""
        if (value, dtype) not in self.casts:
            node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", dtype)], num_outputs=1)
            node.outputs[0].name = f"{value.name}/{dtype.name.lower()}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
            if reader is None:
                self.graph.append(node)
            else:
                self.graph.insert_before(reader, node)
            self.casts[value, dtype] = node.outputs[0]
        return self.casts[value, dtype]
