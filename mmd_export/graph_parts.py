"""Parts of an ONNX sampler, run by themselves: from values that are given to values that are asked for. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.folders import scratch_folder
from mmd_export.precision.trajectory import open_model

Array = NDArray[Any]
PLAN = "plan"
DECODER = "decoder"


class GraphParts:
    """An unrolled sampler as ``mmd_export.onnx_compose`` writes it, by the names of its values."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.producer = {str(value.name): node for node in model.graph for value in node.outputs if value.name}
        self.labels = _labels(model.graph)

    def run(self, known: Mapping[str, Array], goals: Iterable[str]) -> dict[str, Array]:
        """``goals`` computed from ``known``, in onnxruntime on one thread; known goals are given back."""
        wanted = list(dict.fromkeys(goals))
        missing = [name for name in wanted if name not in known]
        found = {name: known[name] for name in wanted if name in known}
        if not missing:
            return found
        part = self._part(known, missing)
        with scratch_folder() as folder:
            session = open_model(part, folder)
            feeds = {value.name: known[value.name] for value in session.get_inputs()}
            results = session.run(missing, feeds)
        return found | dict(zip(missing, results, strict=True))

    def needed(self, known: Iterable[str], goal: str) -> list[str]:
        """The values that ``goal`` needs beyond ``known``, in the order of the graph, ``goal`` last."""
        nodes, _ = self._reach(set(known), [goal])
        return [str(value.name) for node in self.model.graph if node in nodes for value in node.outputs if value.name]

    def read(self, known: Iterable[str], goal: str) -> set[str]:
        """Which of ``known`` is read on the way to ``goal``."""
        given = set(known)
        return {goal} if goal in given else self._reach(given, [goal])[1] & given

    def between(self, known: Iterable[str], goal: str) -> list[ir.Node]:
        """The nodes that compute ``goal`` from ``known``, in order."""
        nodes, _ = self._reach(set(known), [goal])
        return [node for node in self.model.graph if node in nodes]

    def _reach(self, known: set[str], goals: Iterable[str]) -> tuple[set[ir.Node], set[str]]:
        """The nodes behind ``goals`` as far as ``known``, and the values that they take from outside."""
        nodes: set[ir.Node] = set()
        outside: set[str] = set()
        pending = list(goals)
        seen = set(pending)
        while pending:
            name = pending.pop()
            if name in known or name not in self.producer:
                outside.add(name)
                continue
            nodes.add(self.producer[name])
            fresh = {str(value.name) for value in self.producer[name].inputs if value is not None} - seen
            seen |= fresh
            pending.extend(fresh)
        return nodes, outside

    def _part(self, known: Mapping[str, Array], goals: list[str]) -> ir.Model:
        """A model of its own: copies of the nodes, the weights shared."""
        nodes, outside = self._reach(set(known), goals)
        graph = self.model.graph
        inputs = [_input(name, known[name]) for name in sorted(outside & set(known))]
        values: dict[str, ir.Value] = {str(value.name): value for value in inputs}
        weights = []
        for name in sorted(outside - set(known)):
            value = graph.initializers[name]
            copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            values[name] = copy
            weights.append(copy)
        copies = [_copy(node, values) for node in graph if node in nodes]  # in order: each adds its outputs to values
        return ir.Model(
            ir.Graph(
                inputs, [values[name] for name in goals], nodes=copies, initializers=weights,
                opset_imports=dict(graph.opset_imports), name="part",
            ),
            ir_version=self.model.ir_version,
        )  # fmt: skip


def _copy(node: ir.Node, values: dict[str, ir.Value]) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[str(value.name)] for value in node.inputs],
        attributes=list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=node.name,
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type = old.name, old.type
        values[str(old.name)] = new
    return copy


def _input(name: str, array: Array) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(np.asarray(array).dtype))
    return ir.Value(name=name, type=kind, shape=ir.Shape(np.shape(array)))


def weights_of(nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    """The parameters that nodes read, by their names in the checkpoint."""
    names = [str(value.name) for node in nodes for value in node.inputs if value is not None and _is_parameter(value)]
    return tuple(dict.fromkeys(name.split("/")[0] for name in names))


def _is_parameter(value: ir.Value) -> bool:
    """Whether it is a weight or bias of the checkpoint, perhaps in another precision (``NAME/int8``)."""
    plain = str(value.name).split("/")[0]
    return value.const_value is not None and plain.rpartition(".")[2] in ("weight", "bias")


def _labels(graph: ir.Graph) -> dict[str, str]:
    """The block of every value: the module whose weights its node reads, or the next node that reads any does."""
    labels: dict[str, str] = {}
    waiting: list[str] = []
    last = PLAN
    for node in graph:
        names = [str(value.name) for value in node.outputs if value.name]
        if not any(name.startswith("step.") and not _of_plan(name) for name in names):
            label = DECODER if any(name.startswith("decode/") for name in names) else PLAN
            labels |= dict.fromkeys(names, label)
            labels |= dict.fromkeys(waiting, last)  # what ends a call belongs to its last block
            waiting = []
            continue
        waiting += names
        if weights := weights_of([node]):
            last = _block(weights[0])
            labels |= dict.fromkeys(waiting, last)
            waiting = []
    return labels | dict.fromkeys(waiting, last)


def _of_plan(name: str) -> bool:
    """Whether a value named after a step is the sampler's arithmetic, not the network's."""
    return name.partition("/")[2].split(".")[0] in ("scaled", "guess")


def _block(weight: str) -> str:
    """``mid_block.resnets.0`` of ``mid_block.resnets.0.conv1.weight``; a layer that stands alone is its own block."""
    layer = weight.rpartition(".")[0]
    return layer.rpartition(".")[0] or layer
