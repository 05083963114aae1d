"""What a finished ONNX graph must not hold, and what there is to know of it. onnx_ir, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mmd_export.conditions import Condition, names_of
from mmd_export.errors import NotAvailableError
from mmd_export.onnx_memory import peak_activation_bytes

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
_TRAINING = {"Dropout"}


@dataclass(frozen=True)
class GraphReport:
    """Sizes of a graph. ``unique_weight_bytes`` counts every initialiser once; see ``onnx_memory`` for the peak."""

    nodes: int
    unique_weight_bytes: int
    op_counts: dict[str, int]
    form: str
    peak_activation_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def report(model: ir.Model, batch: int = 1) -> GraphReport:
    """Count nodes, weights, ops and activations of ``model``, these at ``batch``."""
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    form = "loop" if counts["Loop"] else "unrolled"
    return GraphReport(
        counts.total(), sum(sizes), dict(sorted(counts.items())), form, peak_activation_bytes(model, batch)
    )


def faults(model: ir.Model, conditions: Sequence[Condition] = ()) -> list[str]:
    """Everything that a static sampler graph may not hold, each in a phrase; empty if there is none."""
    inputs = {"noise", "step_noise", *names_of(conditions)}
    found = [f"input {value.name!r} (a timestep?)" for value in model.graph.inputs if value.name not in inputs]
    if model.metadata_props or model.doc_string or model.graph.metadata_props or model.graph.doc_string:
        found.append("metadata on the model")
    if model.functions:
        found.append(f"{len(model.functions)} model-local functions")
    loops = [node for node in model.graph if node.op_type == "Loop"]
    for node in model.graph.all_nodes():
        if node.domain:
            found.append(f"node {node.name!r} of the custom domain {node.domain!r}")
        if node.op_type in _RANDOM | _CONTROL_FLOW | _TRAINING and not (len(loops) == 1 and _counts(loops[0], node)):
            found.append(f"node {node.name!r} ({node.op_type})")
        if node.metadata_props or node.doc_string:
            found.append(f"metadata on node {node.name!r}")
        found += [f"float64 value {value.name!r}" for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
    found += [f"float64 input {value.name!r}" for value in model.graph.inputs if value.dtype == ir.DataType.DOUBLE]
    values = model.graph.initializers.values()
    found += [f"float64 weight {value.name!r}" for value in values if value.dtype == ir.DataType.DOUBLE]
    return found


def _counts(loop: ir.Node, node: ir.Node) -> bool:
    """Whether ``node`` is the sampler's own loop: a constant number of trips, none of them stopped early."""
    return node is loop and all(value is not None and value.const_value is not None for value in loop.inputs[:2])


def require_clean(model: ir.Model, conditions: Sequence[Condition] = ()) -> None:
    """Raise NotAvailableError that names the first fault."""
    if found := faults(model, conditions):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NotAvailableError(f"the ONNX graph holds {found[0]}{more}; a static sampler graph may not")
