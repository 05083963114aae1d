"""What a manifest says of a program, whatever compiles it."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mmd_export.liveness import Operation, peak_bytes
from mmd_export.plan import StepPlan
from mmd_export.program import SamplerProgram


def program_facts(program: SamplerProgram) -> dict[str, int]:
    """Bytes of the weights, each once, of what the time grid made constant, of activations; fields of GraphInfo."""
    calls = [program.step, *([] if program.decoder is None else [program.decoder.call])]
    weights = {id(value): value.nbytes for call in calls for value in (*call.state_dict.values(),)}
    folded = [value for k in range(program.plan.step_count) for value in program.constants(k)]
    folded_bytes = sum(value.nbytes for value in folded)
    return {
        "unique_weight_bytes": sum(weights.values()) + folded_bytes,
        "folded_values": len(folded),
        "folded_bytes": folded_bytes,
        "peak_activation_bytes": peak_activation_bytes(program),
    }


def peak_activation_bytes(program: SamplerProgram) -> int:
    """That of the largest call, and what the plan keeps meanwhile; views count as values, as nodes of ONNX do."""
    batch = program.batch or 1
    state = 4 * batch * math.prod(program.shape)
    network = call_peak(program.step, batch, inputs=1 + len(program.conditions))
    peak = max(network + state * kept_beside(program.plan, k) for k in range(program.plan.step_count))
    return peak if program.decoder is None else max(peak, call_peak(program.decoder.call, batch, inputs=1))


def call_peak(call: ExportedProgram, batch: int, inputs: int) -> int:
    """The most bytes alive at once in a captured call whose first ``inputs`` inputs stay; weights are not counted."""
    given = [
        node for node in call.graph.nodes if node.op == "placeholder" and node.name in call.graph_signature.user_inputs
    ]
    kept = {node: _bytes(node, batch) for node in given[:inputs]}
    fixed = {node for node in call.graph.nodes if node.op == "placeholder" and node not in kept}
    operations, whole = [], dict[fx.Node, fx.Node]()  # one of several results: the operator that made them all
    for node in call.graph.nodes:
        reads = [whole.get(read, read) for read in node.all_input_nodes]
        if node.op != "call_function":
            continue
        if reads and fixed.issuperset(reads):
            fixed.add(node)  # of weights alone
        if node.target is operator.getitem:
            whole[node] = reads[0]
            continue
        operations.append(Operation(reads, {} if node in fixed else {node: _bytes(node, batch)}))
    last = (whole.get(read, read) for read in call.graph.output_node().all_input_nodes)
    return peak_bytes(kept, operations, {*kept, *last})


def kept_beside(plan: StepPlan, k: int) -> int:
    """How many states, beside its input, a sampler holds while call ``k`` runs: history, and noise of later steps."""
    later = {(term.source, term.index) for step in plan.steps[k:] for term in step.update}
    history = {(source, index) for source, index in later if source != "noise" and index < k}
    scaled = plan.steps[k].scale != 1.0 and ("state", k) in later  # its input is a state of its own then
    noise = plan.noisy_steps if any(source == "noise" for source, _ in later) else 0
    return len(history) + scaled + noise


def _bytes(node: fx.Node, batch: int) -> int:
    """Of a value, or of all that an operator returns."""
    made: Any = node.meta.get("val")
    values = made if isinstance(made, (tuple, list)) else (made,)
    sized = [value for value in values if hasattr(value, "element_size")]
    return sum(value.element_size() * math.prod(_size(each, batch) for each in value.shape) for value in sized)


def _size(size: int | torch.SymInt, batch: int) -> int:
    """A free size at ``batch``, the only symbol that there is."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, batch)))
