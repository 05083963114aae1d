"""Compose K copies of one network call and the plan's arithmetic into one ONNX graph. onnx_ir, no torch.

Values carry the plan's names: ``state.<k>`` after every step, ``output.<k>`` and ``clean.<k>`` inside, ``sample`` at
the end; nodes of call k start with ``step.<k>/``, those of a decoder with ``decode/``. Weights are
initialisers shared by all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.conditions import Condition
from mmd_export.onnx_copy import copy_nodes
from mmd_export.plan import StepPlan, Term

_DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
IR_VERSION = 10  # of ONNX 1.17; the oldest that carries opset 20 and that current runtimes all read


@dataclass(frozen=True)
class GraphSpec:
    """The outside of the graph. ``batch``: a number, or None for a symbolic dimension; ``output``: float32 or uint8.

    ``decoder``: latent -> image, and (C, H, W) of the image; without it the graph ends in the state.
    """

    shape: tuple[int, int, int]
    batch: int | None = 1
    conditions: tuple[Condition, ...] = ()
    output: str = "float32"
    decoder: tuple[ir.Model, tuple[int, int, int]] | None = None

    @property
    def batch_dim(self) -> int | str:
        """The first dimension as ONNX and the manifest write it."""
        return "batch" if self.batch is None else self.batch


class Composer:
    """Collects nodes and initialisers; one method an idea. ``outer``: whose conditions a subgraph sees."""

    def __init__(self, call: ir.Model, plan: StepPlan, spec: GraphSpec, outer: Composer | None = None) -> None:
        self.call, self.plan, self.spec = call.graph, plan, spec
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.image: tuple[int | str, ...] = (spec.batch_dim, *spec.shape)
        self.known: dict[tuple[str, int], ir.Value] = {}
        self.decoded: ir.Value | None = None
        self.conditions: list[ir.Value] = (
            outer.conditions
            if outer is not None
            else [
                self.input(condition.name, _DTYPES[condition.dtype], (spec.batch_dim, *condition.shape))
                for condition in spec.conditions
            ]
        )

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def inputs(self) -> tuple[list[ir.Value], ir.Value | None]:
        """The inputs of the whole graph, noise first; and ``step_noise`` if the plan is stochastic."""
        noise = self.input("noise", ir.DataType.FLOAT, self.image)
        if not self.plan.noisy_steps:
            return [noise, *self.conditions], None
        step_noise = self.input("step_noise", ir.DataType.FLOAT, (self.plan.noisy_steps, *self.image))
        return [noise, step_noise, *self.conditions], step_noise

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """One initialiser a name."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.initializers[name] = value
        return self.initializers[name]

    def scalar(self, number: float) -> ir.Value:
        """A float32 number of the plan; equal numbers are one initialiser."""
        return self.constant(f"plan/{float(np.float32(number))!r}", np.array(number, dtype=np.float32))

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: ir.Attr) -> ir.Value:
        """One float32 node of the image's shape, or what the caller makes of it."""
        node = ir.Node(
            "", op_type, inputs, attributes=list(attributes.values()), num_outputs=1, name=f"{name}/{op_type}"
        )
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(self.image)
        self.nodes.append(node)
        return node.outputs[0]

    def scaled(self, weight: float, value: ir.Value, name: str) -> ir.Value:
        return value if weight == 1.0 else self.op("Mul", [value, self.scalar(weight)], name)

    def weighted_sum(self, terms: Sequence[Term], name: str) -> ir.Value:
        """Sum of ``weight * known[source, index]`` in the order of ``terms``; the last node is called ``name``."""
        first, *rest = terms
        total = self.op(
            "Mul", [self.known[first.source, first.index], self.scalar(first.weight)], self._part(name, 0, rest)
        )
        for i, term in enumerate(rest, start=1):
            product = self.op(
                "Mul", [self.known[term.source, term.index], self.scalar(term.weight)], f"{name}/product.{i}"
            )
            total = self.op("Add", [total, product], self._part(name, i, rest[i:]))
        return total

    @staticmethod
    def _part(name: str, i: int, rest: Sequence[Term]) -> str:
        return f"{name}/sum.{i}" if rest else name

    def network(self, place: str, x: ir.Value, constants: Sequence[ir.Value]) -> ir.Value:
        """Copy the captured call, inputs (x, *conditions, *constants); names of its nodes start with ``place``."""
        given = [x, *self.conditions, *constants]
        nodes, output = copy_nodes(self.call, given, f"{place}/", self.initializers)
        self.nodes += nodes
        return output

    def sum(self, parts: Sequence[ir.Value], name: str) -> ir.Value:
        """The parts added in their order; the last node is called ``name``."""
        total, *rest = parts
        for i, part in enumerate(rest, start=1):
            total = self.op("Add", [total, part], name if i == len(rest) else f"{name}/sum.{i}")
        return total

    def step(self, k: int, constants: Sequence[NDArray[np.generic]]) -> None:
        """One step of the plan; the formula is in the docstring of ``mmd_export.plan``."""
        step, state = self.plan.steps[k], self.known["state", k]
        folded = [self.constant(f"step.{k}/time.{i}", array) for i, array in enumerate(constants)]
        output = self.network(f"step.{k}", self.scaled(step.scale, state, f"step.{k}/scaled"), folded)
        output.name = f"output.{k}"
        self.known["output", k] = output
        if step.clean is not None and self.plan.clip is not None:
            guess = self._guess(k, step.clean, state, output)
            limits = [self.scalar(-self.plan.clip), self.scalar(self.plan.clip)]
            self.known["clean", k] = self.op("Clip", [guess, *limits], f"clean.{k}")
        self.known["state", k + 1] = self.weighted_sum(step.update, f"state.{k + 1}")

    def _guess(self, k: int, weights: tuple[float, float], state: ir.Value, output: ir.Value) -> ir.Value:
        a, b = weights
        from_output = self.op("Mul", [output, self.scalar(b)], f"step.{k}/guess.output")
        if a == 0.0:
            return from_output
        from_state = self.op("Mul", [state, self.scalar(a)], f"step.{k}/guess.state")
        return self.op("Add", [from_state, from_output], f"step.{k}/guess")

    def decode(self, decoder: ir.Model, shape: tuple[int, int, int]) -> None:
        """Append the decoder behind ``state.K``; what comes out, (B, *shape), stands in its place from here on."""
        last = self.known["state", self.plan.step_count]
        nodes, image = copy_nodes(decoder.graph, [last], "decode/", self.initializers, weights="decode/")
        self.nodes += nodes
        self.image = (self.spec.batch_dim, *shape)
        self.decoded = image

    def sample(self) -> ir.Value:
        """Clamp the last state or its image, or turn that into uint8 NHWC as diffusers' image processor does."""
        last = self.decoded or self.known["state", self.plan.step_count]
        limits = [self.scalar(-1.0), self.scalar(1.0)]
        if self.spec.output == "uint8":
            return self._uint8(self.op("Clip", [last, *limits], "sample/clamped"))
        if not self.plan.clamp_output and self.decoded is None:
            return self.op("Identity", [last], "sample")
        return self.op("Clip", [last, *limits], "sample")

    def _uint8(self, image: ir.Value) -> ir.Value:
        """round((x / 2 + 0.5) * 255), channels last; the cast is the last node: TensorRT has UINT8 at the edge only."""
        unit = self.op(
            "Add", [self.op("Mul", [image, self.scalar(0.5)], "sample/half"), self.scalar(0.5)], "sample/unit"
        )
        rounded = self.op("Round", [self.op("Mul", [unit, self.scalar(255.0)], "sample/255")], "sample/rounded")
        batch, channels, height, width = self.image
        last = self.op("Transpose", [rounded], "sample/channels_last", perm=ir.AttrInt64s("perm", [0, 2, 3, 1]))
        result = self.op("Cast", [last], "sample", to=ir.AttrInt64("to", ir.DataType.UINT8))
        result.type = ir.TensorType(ir.DataType.UINT8)
        last.shape = result.shape = ir.Shape((batch, height, width, channels))
        return result


def compose(
    call: ir.Model, plan: StepPlan, constants: Sequence[Sequence[NDArray[np.generic]]], spec: GraphSpec
) -> ir.Model:
    """The whole sampler as one graph: noise [, step_noise] [, conditions] -> sample.

    Args:
        call: one network call, inputs (x, *conditions, *constants), one output.
        plan: the numbers.
        constants: what ``call`` takes besides, for each of the K calls.
        spec: shapes, the kind of output, the decoder.
    """
    composer = Composer(call, plan, spec)
    inputs, step_noise = composer.inputs()
    for s in range(plan.noisy_steps):
        assert step_noise is not None
        index = composer.constant(f"plan/index.{s}", np.array(s, dtype=np.int64))
        axis = ir.AttrInt64("axis", 0)
        composer.known["noise", s] = composer.op("Gather", [step_noise, index], f"step_noise.{s}", axis=axis)
    composer.known["state", 0] = composer.scaled(plan.initial_scale, inputs[0], "state.0")
    for k in range(plan.step_count):
        composer.step(k, constants[k])
    return sampler_model(composer, inputs, call)


def sampler_model(composer: Composer, inputs: Sequence[ir.Value], call: ir.Model) -> ir.Model:
    """The finished model: what the composer holds, from ``inputs`` to its sample."""
    if composer.spec.decoder is not None:
        composer.decode(*composer.spec.decoder)
    sample = composer.sample()
    graph = ir.Graph(
        inputs,
        [sample],
        nodes=composer.nodes,
        initializers=list(composer.initializers.values()),
        opset_imports=dict(call.opset_imports),
        name="sampler",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="mmd-export")
