"""Which operations of a call stay float32 when the rest becomes 16 bits wide, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from mmd_export.ends import giving, phases, reading
from mmd_export.precision.formats import Half
from mmd_export.precision.scan import Scan, is_float

# Sums of squares and exponentials: inside them a number leaves the range, or loses digits, where neither operands nor
# results do. On digits, in float32 arithmetic with rounded results, they change little (benchmarks/results/
# precision.json); they are for devices that keep to 16 bits inside, as onnx's reference evaluator does in the tests.
DELICATE = {
    "InstanceNormalization", "LayerNormalization", "GroupNormalization", "LpNormalization", "Softmax", "LogSoftmax",
    "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd", "CumSum",
    "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "ArgMax", "ArgMin", "TopK",
}  # fmt: skip
_SINUSOIDS = {"Sin", "Cos"}
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# They read a shape or a sign of what they are given, in whatever type it comes.
INDIFFERENT = {"Shape", "Size"}
_NO_RESULTS = {"Constant", *INDIFFERENT}


@dataclass(frozen=True)
class Signature:
    """What a node takes: float inputs that must be float32 (by index), and whether the others may be 16 bits wide."""

    fixed: frozenset[int]
    flexible: bool


def islands(model: ir.Model, seen: Scan, half: Half) -> dict[ir.Node, str]:
    """The nodes of ``model`` that stay float32, each with the reason: phase, operation, type, range or sum."""
    unsafe = {name for name, largest in seen.largest.items() if not fits(largest, half)}
    unsafe |= {
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and is_float(value) and _loses(value.const_value, half)
    }
    sinusoids = [node for node in model.graph if node.op_type in _SINUSOIDS]
    found = dict.fromkeys(phases(_readers(model), _after, _before, sinusoids), "phase")
    for node in model.graph:
        if reason := _reason(node, unsafe, seen.partial, half):
            found[node] = reason
    return found


def ends(model: ir.Model) -> dict[ir.Node, str]:
    """The nodes of a call from the state to the first products, and from the sum before the last product on."""
    state = model.graph.inputs[0]

    def is_sum(node: ir.Node) -> bool:
        """A weight, and what is made of weights alone such as a reshaped bias, was not computed."""
        added = [each for each in _before(node) if _before(each) or state in each.inputs]
        return node.op_type == "Add" and len(added) > 1

    last = [node for value in model.graph.outputs if (node := value.producer()) is not None]
    found = reading(_readers(model), _after, _is_product) | giving(last, _before, _is_product, is_sum)
    return {node: "end" for node in model.graph if node in found}


def _readers(model: ir.Model) -> list[ir.Node]:
    """What reads the state."""
    return [use.node for use in model.graph.inputs[0].uses() if _is_of_floats(use.node)]


def _after(node: ir.Node) -> list[ir.Node]:
    return [each for each in node.successors() if _is_of_floats(each)]


def _before(node: ir.Node) -> list[ir.Node]:
    return [each for each in node.predecessors() if _is_of_floats(each)]


def _is_product(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS


def _is_of_floats(node: ir.Node) -> bool:
    return node.op_type not in _NO_RESULTS and any(is_float(value) for value in node.outputs)


def promoted(model: ir.Model, values: frozenset[str]) -> dict[ir.Node, str]:
    """The nodes that give one of ``values``: they are kept because a verification asked for it."""
    return {node: "parity" for node in model.graph if any(str(value.name) in values for value in node.outputs)}


def fits(largest: float, half: Half) -> bool:
    """Whether values up to ``largest`` keep their digits, with headroom; zeros do."""
    return largest == 0.0 or half.smallest <= largest <= half.largest


def _loses(tensor: ir.TensorProtocol, half: Half) -> bool:
    """Whether a single number, such as the epsilon of a division, becomes subnormal or zero."""
    return tensor.size == 1 and not fits(float(np.abs(tensor.numpy()).max()), half)


def _reason(node: ir.Node, unsafe: set[str], partial: Mapping[str, float], half: Half) -> str:
    floats = [value for value in (*node.inputs, *node.outputs) if value is not None and is_float(value)]
    if not floats or node.op_type in INDIFFERENT:
        return ""
    if node.op_type in DELICATE or (node.op_type == "Div" and not _is_weight(node.inputs[1])):
        return "operation"
    if not signature(node, half).flexible or not any(is_float(value) for value in node.outputs):
        return "type"
    if any(value.name in unsafe for value in floats):
        return "range"
    return "sum" if any(partial.get(str(value.name), 0.0) > half.largest for value in node.outputs) else ""


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def signature(node: ir.Node, half: Half) -> Signature:
    """Read off the ONNX schema of the node's operation."""
    inputs = tuple(i for i, value in enumerate(node.inputs) if is_float(value))
    outputs = tuple(i for i, value in enumerate(node.outputs) if is_float(value))
    return _signature(node.op_type, node.domain, half, inputs, outputs)


@lru_cache(maxsize=1024)
def _signature(op_type: str, domain: str, half: Half, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Signature:
    from onnx import defs

    schema = defs.get_schema(op_type, half.opset, domain)
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    wanted = f"tensor({half.dtype.name.lower()})"

    def parameter(parameters: Any, i: int) -> str:
        return str(parameters[min(i, len(parameters) - 1)].type_str)  # the last may stand for many

    fixed = frozenset(i for i in inputs if parameter(schema.inputs, i) not in allowed)
    others = [parameter(schema.inputs, i) for i in inputs if i not in fixed]
    others += [parameter(schema.outputs, i) for i in outputs]
    return Signature(fixed, bool(others) and all(wanted in allowed.get(kind, ()) for kind in others))
