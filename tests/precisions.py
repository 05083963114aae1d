"""Calls and finished graphs in lower precisions, for their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from mmd_export.checkpoint import load_checkpoint
from mmd_export.onnx_compose import GraphSpec, compose
from mmd_export.onnx_translate import translate
from mmd_export.plan import StepPlan
from mmd_export.precision.trajectory import Calls
from mmd_export.program import export_program
from mmd_export.reference import golden_inputs, run_chain, sampler_of
from mmd_export.targets.onnx import clean_up

Golden: TypeAlias = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]


def calls_of(model: Path | str, steps: int = 2, batch: int | None = 1, **options: Any) -> Calls:
    """The float32 call of a model, captured and translated."""
    checkpoint = load_checkpoint(str(model))
    plan = checkpoint.plan_for(steps, **options)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, batch, checkpoint.conditions)
    constants = [[value.numpy() for value in program.constants(k)] for k in range(steps)]
    return Calls(translate(program.step), constants, plan, checkpoint.shape, batch, checkpoint.conditions)


def whole(calls: Calls) -> ir.Model:
    """The sampler round the calls."""
    spec = GraphSpec(calls.shape, calls.batch, calls.conditions)
    model = compose(calls.model.clone(), calls.plan, calls.constants, spec)
    clean_up(model)
    return model


def hand_made(
    nodes: list[tuple[str, list[str], str, dict[str, Any]]],
    weights: dict[str, NDArray[np.float32]],
    plan: StepPlan,
    shape: tuple[int, int, int] = (2, 4, 4),
) -> Calls:
    """A call x -> y of (op, inputs, output, attributes) in order, opset 20; the last output is y."""
    values: dict[str, ir.Value] = {
        "x": ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, *shape)))
    }
    for name, array in weights.items():
        values[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array.astype(np.float32), name=name),
        )
    made = []
    for op, inputs, output, attributes in nodes:
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", op, [values[name] for name in inputs], attributes=attrs, num_outputs=1)
        node.outputs[0].name = output
        values[output] = node.outputs[0]
        made.append(node)
    graph = ir.Graph(
        [values["x"]], [made[-1].outputs[0]], nodes=made, initializers=[values[name] for name in weights],
        opset_imports={"": 20}, name="call",
    )  # fmt: skip
    made[-1].outputs[0].shape = ir.Shape((1, *shape))
    made[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    rows: list[list[NDArray[Any]]] = [[] for _ in plan.steps]
    return Calls(ir.Model(graph, ir_version=10), rows, plan, shape, 1)


def open_session(
    model: ir.Model, optimised: Path | None = None, *, as_written: bool = False
) -> onnxruntime.InferenceSession:
    """One thread; what onnxruntime made of the graph goes to ``optimised``.

    ``as_written``: products of dequantised values in float32, not integer kernels, which saturate on processors without
    VNNI.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    if as_written:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings, ["CPUExecutionProvider"])


def run(model: ir.Model, inputs: dict[str, Any], *names: str, as_written: bool = False) -> list[NDArray[Any]]:
    """Values by name in onnxruntime; all outputs if none is named."""
    opened = model.clone()
    made = {value.name: value for node in opened.graph for value in node.outputs}
    opened.graph.outputs.extend(made[name] for name in names if name != "sample")
    found: list[NDArray[Any]] = open_session(opened, as_written=as_written).run(list(names) or None, inputs)
    return found


def dtypes(model: ir.Model) -> set[str]:
    """Of every value and weight."""
    values = [value for node in model.graph for value in node.outputs] + list(model.graph.initializers.values())
    return {value.dtype.name for value in values if value.dtype is not None}


@pytest.fixture(scope="session")
def attention_calls(tiny_attention: Path) -> Calls:
    """Two steps of ``tiny_attention``, float32."""
    return calls_of(tiny_attention)


@pytest.fixture(scope="session")
def attention_golden(tiny_attention: Path) -> Golden:
    """Inputs of one image, and the float64 reference's states and sample."""
    checkpoint = load_checkpoint(str(tiny_attention))
    plan = checkpoint.plan_for(2)
    inputs = golden_inputs(checkpoint, plan, 1)
    return inputs, run_chain(sampler_of(checkpoint.as_double(), plan), inputs, torch.float64)
