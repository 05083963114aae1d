"""The layers of a call that can be quantised: products of an activation with a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmd_export.precision.scan import is_float

_CONV, _LINEAR = "Conv", ("MatMul", "Gemm")


@dataclass(frozen=True)
class Layer:
    """``node`` multiplies ``activation``, its first input, with ``weight``, its second; channels lie on ``axis``."""

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    axis: int

    @property
    def convolution(self) -> bool:
        """Whether it is one; else it is linear."""
        return self.node.op_type == _CONV

    @property
    def size(self) -> int:
        """How many values the weight holds."""
        return 0 if self.weight.const_value is None else int(self.weight.const_value.size)


def layers(model: ir.Model) -> list[Layer]:
    """All of them, in order; a weight that something else reads too is left alone."""
    found = [layer for node in model.graph if (layer := _layer(node)) is not None]
    nodes = {layer.node for layer in found}
    return [layer for layer in found if all(use.node in nodes for use in layer.weight.uses())]


def fold_transposes(model: ir.Model) -> None:
    """A weight that is only read transposed is stored so; the translation leaves large ones to run time."""
    for node in list(model.graph):
        weight, turned = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Transpose" or weight is None or weight.const_value is None or len(weight.uses()) > 1:
            continue
        axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        array = np.ascontiguousarray(weight.const_value.numpy().transpose(axes))
        name = f"{weight.name}/transposed"
        value = ir.Value(
            name=name, type=weight.type, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name)
        )
        model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(turned, value)
        model.graph.remove(node, safe=True)


def _layer(node: ir.Node) -> Layer | None:
    if node.domain or node.op_type not in (_CONV, *_LINEAR):
        return None
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or not is_float(activation) or not is_float(weight):
        return None
    if weight.const_value is None or activation.const_value is not None or weight.const_value.shape.rank() < 2:
        return None
    rank = weight.const_value.shape.rank()
    if node.op_type == _CONV:
        return Layer(node, activation, weight, 0)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return Layer(node, activation, weight, 0 if transposed else rank - 1)


def outermost(model: ir.Model, found: list[Layer]) -> set[ir.Node]:
    """The layers that read the state before any other layer does, and those that no other layer reads after."""
    nodes = {layer.node for layer in found}
    after = _reached(model, {model.graph.inputs[0]}, nodes)
    first = {
        node for node, (from_state, from_layer) in after.items() if node in nodes and from_state and not from_layer
    }
    read = {parent for node in nodes for parent in _ancestors(node)}
    return first | (nodes - read)


def _reached(model: ir.Model, state: set[ir.Value], nodes: set[ir.Node]) -> dict[ir.Node, tuple[bool, bool]]:
    """For each node, whether its inputs depend on the state, and whether on a layer."""
    on_state: set[ir.Value] = set(state)
    on_layer: set[ir.Value] = set()
    found: dict[ir.Node, tuple[bool, bool]] = {}
    for node in model.graph:
        inputs = {value for value in node.inputs if value is not None}
        found[node] = bool(inputs & on_state), bool(inputs & on_layer)
        if found[node][0]:
            on_state.update(node.outputs)
        if found[node][1] or node in nodes:
            on_layer.update(node.outputs)
    return found


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """Every node that ``node`` depends on."""
    found: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().inputs:
            parent = None if value is None else value.producer()
            if parent is not None and parent not in found:
                found.add(parent)
                pending.append(parent)
    return found
