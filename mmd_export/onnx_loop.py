"""The sampler as one ONNX Loop: the network stands in the graph once, and the plan is tables that the loop reads.

What the unrolled graph holds K times is here the body of a Loop with K trips. It carries the state and as many earlier
states, outputs and clean guesses as the plan looks back to: ``state.lag0`` is the current state, ``output.lag1`` the
output of the call before. The numbers of step k are row k of a table; where a step has no such term its weight is 0.
The loop's last output, ``states`` (K, B, C, H, W), is every state after its step, for parity. onnx_ir, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.onnx_compose import Composer, GraphSpec, sampler_model
from mmd_export.onnx_nodes import PRODUCTS
from mmd_export.plan import Source, StepPlan

STATES = "states"
_HISTORY: tuple[Source, ...] = ("state", "output", "clean")


@dataclass(frozen=True)
class LoopTables:
    """A plan as arrays with one row a call.

    ``weights[source, lag]`` (K,) multiplies what ``source`` was ``lag`` calls ago; ``noise_index`` and ``noise_weight``
    (K, M) the step noises; ``scale``, ``clean_state`` and ``clean_output`` (K,) are those of the steps.
    """

    weights: dict[tuple[Source, int], NDArray[np.float32]]
    noise_index: NDArray[np.int64]
    noise_weight: NDArray[np.float32]
    scale: NDArray[np.float32]
    clean_state: NDArray[np.float32]
    clean_output: NDArray[np.float32]

    def depth(self, source: Source) -> int:
        """How many calls the plan looks back to."""
        return max((lag for name, lag in self.weights if name == source), default=0)


def loop_tables(plan: StepPlan) -> LoopTables:
    """The rows of every step; a term of call j in step k has the lag k - j."""
    calls = plan.step_count
    weights: dict[tuple[Source, int], NDArray[np.float32]] = {}
    drawn: list[list[tuple[int, float]]] = [[] for _ in range(calls)]
    for k, step in enumerate(plan.steps):
        for term in step.update:
            if term.source == "noise":
                drawn[k].append((term.index, term.weight))
            else:
                column = weights.setdefault((term.source, k - term.index), np.zeros(calls, np.float32))
                column[k] += np.float32(term.weight)
    most = max(len(row) for row in drawn)
    padded = [row + [(0, 0.0)] * (most - len(row)) for row in drawn]
    clean = [step.clean or (0.0, 0.0) for step in plan.steps]
    return LoopTables(
        weights=dict(sorted(weights.items(), key=lambda item: (item[0][1], _HISTORY.index(item[0][0])))),
        noise_index=np.array([[index for index, _ in row] for row in padded], np.int64).reshape(calls, most),
        noise_weight=np.array([[weight for _, weight in row] for row in padded], np.float32).reshape(calls, most),
        scale=np.array([step.scale for step in plan.steps], np.float32),
        clean_state=np.array([a for a, _ in clean], np.float32),
        clean_output=np.array([b for _, b in clean], np.float32),
    )


class _Body:
    """Writes the body of the loop with the nodes of a composer of its own."""

    def __init__(self, outer: Composer, call: ir.Model, plan: StepPlan, spec: GraphSpec) -> None:
        self.composer = Composer(call, plan, spec, outer)
        self.plan, self.tables = plan, loop_tables(plan)
        self.index = self.composer.input("loop/index", ir.DataType.INT64, ())
        self.going = self.composer.input("loop/going", ir.DataType.BOOL, ())
        self.carried: dict[tuple[Source, int], ir.Value] = {}
        for source in _HISTORY:
            for lag in range(0 if source == "state" else 1, self.tables.depth(source) + 1):
                name = f"{source}.lag{lag}"
                self.carried[source, lag] = self.composer.input(name, ir.DataType.FLOAT, self.composer.image)

    def row(self, name: str, table: NDArray[np.generic]) -> ir.Value:
        """Row ``loop/index`` of a table with one row a call."""
        value = self.composer.constant(f"plan/{name}", table)
        row = self.composer.op("Gather", [value, self.index], f"loop/{name}", axis=ir.AttrInt64("axis", 0))
        row.type, row.shape = value.type, ir.Shape(table.shape[1:])
        return row

    def scaled(self, value: ir.Value, name: str, table: NDArray[np.float32]) -> ir.Value:
        return self.composer.op("Mul", [value, self.row(name, table)], f"loop/{name}.product")

    def write(self, constants: Sequence[Sequence[NDArray[np.generic]]], step_noise: ir.Value | None) -> ir.Graph:
        """Inputs (index, going, *carried), outputs (going, *carried, state)."""
        tables, composer = self.tables, self.composer
        now = self.carried.copy()
        state = now["state", 0]
        x = state if (tables.scale == 1.0).all() else self.scaled(state, "scale", tables.scale)
        rows = [self.row(f"time.{i}", np.stack(column)) for i, column in enumerate(zip(*constants, strict=True))]
        now["output", 0] = composer.network("loop", x, rows)
        if any(step.clean is not None for step in self.plan.steps):
            now["clean", 0] = self._clean(state, now["output", 0])
        terms = [
            self.scaled(now[source, lag], f"{source}.weight{lag}", column)
            for (source, lag), column in tables.weights.items()
        ]
        after = composer.sum(terms + self._noises(step_noise), "loop/state")
        now["state", -1] = after
        going = composer.op("Identity", [self.going], "loop/goes_on")
        going.type, going.shape = self.going.type, ir.Shape(())
        last = [composer.op("Identity", [now[source, lag - 1]], f"{source}.next{lag}") for source, lag in self.carried]
        seen = composer.op("Identity", [after], "loop/seen")
        return ir.Graph(
            [self.index, self.going, *self.carried.values()], [going, *last, seen], nodes=composer.nodes, name="step"
        )

    def _clean(self, state: ir.Value, output: ir.Value) -> ir.Value:
        tables, composer = self.tables, self.composer
        parts = [self.scaled(output, "clean.output", tables.clean_output)]
        if tables.clean_state.any():
            parts.insert(0, self.scaled(state, "clean.state", tables.clean_state))
        assert self.plan.clip is not None  # StepPlan checks it for every step that clamps
        limits = [composer.scalar(-self.plan.clip), composer.scalar(self.plan.clip)]
        return composer.op("Clip", [composer.sum(parts, "loop/guess"), *limits], "loop/clean")

    def _noises(self, step_noise: ir.Value | None) -> list[ir.Value]:
        terms: list[ir.Value] = []
        for m in range(self.tables.noise_index.shape[1] if step_noise is not None else 0):
            index = self.row(f"noise.index{m}", self.tables.noise_index[:, m])
            axis = ir.AttrInt64("axis", 0)
            noise = self.composer.op("Gather", [step_noise, index], f"loop/noise.{m}", axis=axis)
            terms.append(self.scaled(noise, f"noise.weight{m}", self.tables.noise_weight[:, m]))
        return terms


def quantised_weights(graph: ir.Graph) -> list[ir.Value]:
    """What the matrix products of the body dequantise.

    onnxruntime 1.32 fuses such products into MatMulNBits and then looks for their weights in the body alone; it cannot
    load a model that has them outside (TransposeDQWeightsForMatMulNBits, "Missing required weight"). Delete this once
    tests/core/test_onnx_loop.py::test_quantised_products_find_their_weights loads without it.
    """
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node.op_type == "DequantizeLinear" and any(use.node.op_type in PRODUCTS for use in node.outputs[0].uses()):
            found |= {value: None for value in node.inputs if value is not None and value.const_value is not None}
    return list(found)


def compose_loop(
    call: ir.Model, plan: StepPlan, constants: Sequence[Sequence[NDArray[np.generic]]], spec: GraphSpec
) -> ir.Model:
    """The whole sampler around one Loop; arguments as for ``mmd_export.onnx_compose.compose``."""
    composer = Composer(call, plan, spec)
    inputs, step_noise = composer.inputs()
    body = _Body(composer, call, plan, spec)
    first = composer.scaled(plan.initial_scale, inputs[0], "state.0")
    start = [first]
    if len(body.carried) > 1:
        nothing = composer.op("Mul", [inputs[0], composer.scalar(0.0)], "loop/nothing")
        start += [nothing] * (len(body.carried) - 1)
    trips = composer.constant("loop/trips", np.array(plan.step_count, np.int64))
    go = composer.constant("loop/go", np.array(True))
    graph = body.write(constants, step_noise)
    own = quantised_weights(graph)
    for value in own:
        graph.register_initializer(value)
    composer.initializers |= {name: value for name, value in body.composer.initializers.items() if value not in own}
    node = ir.Node(
        "", "Loop", [trips, go, *start], attributes=[ir.AttrGraph("body", graph)],
        num_outputs=len(start) + 1, name="loop",
    )  # fmt: skip
    names = [f"last.{source}.lag{lag}" for source, lag in body.carried]
    for value, name in zip(node.outputs, [*names, STATES], strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(composer.image if name != STATES else (plan.step_count, *composer.image))
    composer.nodes.append(node)
    composer.known["state", plan.step_count] = node.outputs[0]
    return sampler_model(composer, inputs, call)
