"""An ONNX sampler opened up: its states as outputs, or the part between two states. Needs ``onnx``, never at import.

The graph has ``state.1`` ... ``state.K`` as intermediate values, ``state.K`` before the final clamp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, UsageError
from mmd_export.runtime import Arrays

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


def with_states(model: ModelProto, bundle: Bundle, steps: int) -> ModelProto:
    """The model with ``state.1`` ... ``state.<steps>`` as further outputs, float32 (B, C, H, W)."""
    opened = type(model)()
    opened.CopyFrom(model)
    present = {output.name for output in opened.graph.output}
    for step in range(1, steps + 1):
        _require_value(opened, bundle, f"state.{step}")
        if f"state.{step}" not in present:
            opened.graph.output.append(_state_info(bundle, f"state.{step}"))
    return opened


def cut_step(model: ModelProto, bundle: Bundle, step: int, known: Arrays) -> ModelProto:
    """The part of the model that computes ``state.<step>`` from values in ``known``.

    It reaches back from ``state.<step>`` until every path ends in a known value or a weight, so a multistep plan
    reads the earlier states and outputs that are given and recomputes those that are not.
    """
    goal = f"state.{step}"
    _require_value(model, bundle, goal)
    nodes, reached = _reach_back(model, goal, set(known) - {goal})
    weights = {tensor.name for tensor in model.graph.initializer}
    sparse = {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = sorted(reached - weights - sparse)
    missing = [name for name in inputs if name not in known]
    if missing:
        raise UsageError(f"bundle {bundle.name}: step {step} reads '{missing[0]}', given: {sorted(known)}; add it")
    part = type(model)(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = f"{model.graph.name}.{goal}"
    part.graph.node.extend(model.graph.node[index] for index in nodes)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in reached)
    part.graph.sparse_initializer.extend(
        tensor for tensor in model.graph.sparse_initializer if tensor.values.name in reached
    )
    part.graph.input.extend(_input_info(model, name, known) for name in inputs)
    part.graph.output.append(_state_info(bundle, goal))
    return part


def _reach_back(model: ModelProto, goal: str, stops: set[str]) -> tuple[list[int], set[str]]:
    """Indices of the nodes that ``goal`` needs, in graph order, and the values that they take from outside."""
    producer = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}
    needed: set[int] = set()
    outside: set[str] = set()
    pending, seen = [goal], {goal}
    while pending:
        name = pending.pop()
        if name in stops or name not in producer:
            outside.add(name)
            continue
        needed.add(producer[name])
        fresh = {value for value in model.graph.node[producer[name]].input if value} - seen
        seen |= fresh
        pending.extend(fresh)
    return sorted(needed), outside


def _require_value(model: ModelProto, bundle: Bundle, name: str) -> None:
    if not any(name in node.output for node in model.graph.node):
        raise BundleError(
            f"bundle {bundle.name}: the graph has no value '{name}', the golden file has; rebuild the bundle"
        )


def _state_info(bundle: Bundle, name: str) -> ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(bundle.manifest.spec("noise").shape))


def _input_info(model: ModelProto, name: str, known: Arrays) -> ValueInfoProto:
    """As the graph declares it, else as the given array is."""
    from onnx import helper

    declared: dict[str, ValueInfoProto] = {value.name: value for value in model.graph.input}
    if name in declared:
        return declared[name]
    array: Any = known[name]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape))
