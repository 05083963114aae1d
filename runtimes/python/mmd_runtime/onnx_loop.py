"""An ONNX sampler in the form of a Loop, opened up: every state as an output, and its body as a graph of its own.

The body takes (index, going, *carried) and gives (going, *carried, state); ``carried`` are called ``state.lag0`` (the
current state), ``output.lag1`` (the output of the call before), and so on. Needs ``onnx``, never at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.runtime import Array, Arrays

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Run = Callable[[Arrays], list[Array]]
_INDEX, _GOING = "loop/index", "loop/going"


def find_loop(model: ModelProto) -> NodeProto | None:
    """The loop of the sampler, or None if the graph is unrolled."""
    return next((node for node in model.graph.node if node.op_type == "Loop"), None)


def with_loop_states(model: ModelProto, bundle: Bundle, steps: int) -> ModelProto:
    """The model with all states as one further output, (K, B, C, H, W), the loop's last."""
    from onnx import TensorProto, helper

    opened = type(model)()
    opened.CopyFrom(model)
    loop = find_loop(opened)
    assert loop is not None
    shape = [steps, *bundle.manifest.spec("noise").shape]
    opened.graph.output.append(helper.make_tensor_value_info(loop.output[-1], TensorProto.FLOAT, shape))
    return opened


def split_states(results: dict[str, Array], steps: int) -> dict[str, Array]:
    """``states`` (K, B, C, H, W) among the results as ``state.1`` ... ``state.K``."""
    name = next(name for name, array in results.items() if array.ndim == 5 and len(array) == steps)
    rest = {key: value for key, value in results.items() if key != name}
    return {f"state.{k}": state for k, state in enumerate(results[name], start=1)} | rest


def body_model(model: ModelProto) -> ModelProto:
    """The body as a model: index, going, the carried values and the graph's own inputs in; the body's outputs out."""
    loop = find_loop(model)
    assert loop is not None
    body: GraphProto = next(attribute.g for attribute in loop.attribute if attribute.name == "body")
    part = type(model)(ir_version=model.ir_version, opset_import=model.opset_import)
    used = {name for node in body.node for name in node.input if name}
    outside = []  # what the body reads of the nodes round the loop: transformed weights
    for node in reversed(model.graph.node):
        if used.intersection(node.output) and node != loop:
            outside.append(node)
            used.update(filter(None, node.input))
    part.graph.node.extend(reversed(outside))
    part.graph.MergeFrom(body)
    part.graph.initializer.extend(model.graph.initializer)
    part.graph.input.extend(value for value in model.graph.input if value.name in used)
    return part


class LoopStep:
    """Teacher-forced steps of a loop: ``run`` evaluates the body on named arrays."""

    def __init__(self, body: ModelProto, initial_scale: float, run: Run) -> None:
        self.carried = [value.name for value in body.graph.input if ".lag" in value.name]
        self.taken = {value.name for value in body.graph.input}
        self.initial_scale, self.run = initial_scale, run

    def state_after(self, step: int, known: Arrays) -> Array:
        """``state.<step>`` from the given states before it; older outputs are those of the given states."""
        return self._body(step - 1, known, history=True)[-1]

    def _body(self, k: int, known: Arrays, *, history: bool) -> list[Array]:
        feeds: dict[str, Any] = {name: array for name, array in known.items() if name in self.taken}
        feeds |= {_INDEX: np.array(k, np.int64), _GOING: np.array(True)}
        for name in self.carried:
            source, lag = name.split(".lag")
            feeds[name] = self._value(source, k - int(lag), known, recompute=history)
        return self.run({name: array for name, array in feeds.items() if name in self.taken})

    def _value(self, source: str, k: int, known: Arrays, *, recompute: bool) -> Array:
        """``source`` of call k; zero before the first call, and where only the current call's output is wanted."""
        if source == "state" and k >= 0:
            state: Array = known[f"state.{k}"] if k else np.float32(self.initial_scale) * known["noise"]
            return state
        if k < 0 or not recompute:
            return np.zeros_like(known["noise"])
        results = dict(zip(self.carried, self._body(k, known, history=False)[1:-1], strict=True))
        found: Array = results[f"{source}.lag1"]
        return found
