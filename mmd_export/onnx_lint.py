"""What a finished ONNX graph must not hold, and what there is to know of it. onnx_ir, no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mmd_export.conditions import Condition, names_of
from mmd_export.errors import NotAvailableError
from mmd_export.onnx_memory import peak_activation_bytes
from mmd_export.onnx_nodes import weights_of

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
_TRAINING = {"Dropout"}
# Beyond float32, integers of 32 and 64 bits, bool, and the bytes of an image.
_TYPES: dict[str, set[ir.DataType]] = {
    "fp32": set(),
    "fp16": {ir.DataType.FLOAT16},
    "bf16": {ir.DataType.BFLOAT16},
    "int8": {ir.DataType.INT8},
    "fp8": {ir.DataType.FLOAT8E4M3FN},
    "w8": {ir.DataType.INT8},
    "w4": {ir.DataType.INT4, ir.DataType.INT8},
}
_PLAIN = {ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.UINT8}
_NAMES = {ir.DataType.DOUBLE: "float64"}
_SAMPLER = re.compile(r"(state|output|clean|step_noise)\.(lag)?\d+$")
_OPSETS = {"bf16": 22, "w4": 21}  # where the others have 20


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
    sizes = [value.const_value.nbytes for value in weights_of(model) if value.const_value is not None]
    form = "loop" if counts["Loop"] else "unrolled"
    return GraphReport(
        counts.total(), sum(sizes), dict(sorted(counts.items())), form, peak_activation_bytes(model, batch)
    )


def faults(model: ir.Model, conditions: Sequence[Condition] = (), precision: str = "fp32") -> list[str]:
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
        if node.op_type in RANDOM | _CONTROL_FLOW | _TRAINING and not (len(loops) == 1 and _counts(loops[0], node)):
            found.append(f"node {node.name!r} ({node.op_type})")
        if node.metadata_props or node.doc_string:
            found.append(f"metadata on node {node.name!r}")
    return found + _type_faults(model, precision)


def _type_faults(model: ir.Model, precision: str) -> list[str]:
    """Types and opset that the precision does not need, and anything but float32 where the sampler itself computes."""
    made = [value for node in model.graph.all_nodes() for value in node.outputs]
    kinds = (("input", model.graph.inputs), ("value", made), ("weight", weights_of(model)))
    allowed = _PLAIN | _TYPES[precision]
    found = [
        f"{_NAMES.get(value.dtype, value.dtype.name.lower())} {kind} {value.name!r}"
        for kind, values in kinds
        for value in values
        if value.dtype is not None and value.dtype not in allowed
    ]
    own = [value for value in made if value.name is not None and _SAMPLER.match(value.name)]
    found += [
        f"state {value.name!r} that is not float32" for value in own if value.dtype not in (None, ir.DataType.FLOAT)
    ]
    opset, most = model.graph.opset_imports[""], _OPSETS.get(precision, 20)
    return found + ([f"opset {opset}, {precision} needs {most}"] if opset > most else [])


def _counts(loop: ir.Node, node: ir.Node) -> bool:
    """Whether ``node`` is the sampler's own loop: a constant number of trips, none of them stopped early."""
    return node is loop and all(value is not None and value.const_value is not None for value in loop.inputs[:2])


def require_clean(model: ir.Model, conditions: Sequence[Condition] = (), precision: str = "fp32") -> None:
    """Raise NotAvailableError that names the first fault."""
    if found := faults(model, conditions, precision):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NotAvailableError(
            f"the ONNX graph holds {found[0]}{more}; a static sampler graph may not: write the model without it"
        )
