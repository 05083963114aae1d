"""Both ends of a network, which stay float32 in half precision: on graphs by hand, in ONNX and in torch."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from torch import fx

from mmd_export.checkpoint import load_checkpoint
from mmd_export.coreml.capture import capture
from mmd_export.coreml.probe import find_ends
from mmd_export.ends import giving, reading
from mmd_export.onnx_calls import exact_calls
from mmd_export.precision.islands import ends
from mmd_export.precision.lower import lower, typed
from mmd_export.program import SamplerProgram, export_program
from mmd_finetune.emulation import emulate

# name -> what it reads; p: products, s: sums
GRAPHS = {
    "plain": (
        {"scale": [], "p1": ["scale"], "p2": ["p1"], "norm": ["p2"], "p3": ["norm"]},
        {"scale", "p1"},
        {"norm", "p3"},
    ),
    "residual": (
        {"p1": [], "act": ["p1"], "p2": ["act"], "s1": ["p1", "p2"], "act2": ["s1"], "p3": ["act2"], "out": ["p3"]},
        {"p1"},
        {"s1", "act2", "p3", "out"},
    ),
    "two products read the state": ({"p1": [], "p2": [], "s1": ["p1", "p2"], "p3": ["s1"]}, {"p1", "p2"}, {"s1", "p3"}),
    "state beside the network": (  # EDM: c_skip x + c_out F(x)
        {"skip": [], "p1": [], "p2": ["p1"], "out": ["p2"], "s1": ["skip", "out"]},
        {"skip", "p1", "s1"},
        {"skip", "p2", "out", "s1"},
    ),
    "one product": ({"p1": [], "act": ["p1"]}, {"p1"}, {"p1", "act"}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_how_far_the_ends_reach(name: str) -> None:
    graph, first, last = GRAPHS[name]
    readers = {node: [each for each in graph if node in graph[each]] for node in graph}

    def is_product(node: str) -> bool:
        return node.startswith("p")

    starts = [node for node in graph if not graph[node]]
    stops = [node for node in graph if not readers[node]]
    assert reading(starts, readers.__getitem__, is_product) == first
    assert giving(stops, graph.__getitem__, is_product, lambda node: node.startswith("s")) == last


@pytest.fixture(scope="module")
def program() -> SamplerProgram:
    checkpoint = load_checkpoint("digits")
    return export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, 1)


KINDS = ["Conv", "Add", "Reshape", "InstanceNormalization", "Reshape", "Mul", "Add", "Sigmoid", "Mul", "Conv"]


def test_the_graph_of_digits(program: SamplerProgram) -> None:
    calls = exact_calls(program)
    found = ends(typed(calls.model))
    assert [node.op_type for node in found] == KINDS
    said: list[str] = []
    lowered = lower(calls, "fp16", notify=said.append).model
    assert "9 for their end, 19 for their operation" in said[0]  # the norm is of both kinds
    types = [node.outputs[0].dtype for node in lowered.graph if node.op_type == "Conv"]
    assert types[0] == types[-1] == ir.DataType.FLOAT
    assert set(types[1:-1]) == {ir.DataType.FLOAT16}


def test_every_call_of_a_captured_sampler(program: SamplerProgram) -> None:
    captured = capture(program, "float32")
    found = find_ends(captured)
    assert not found & captured.plan
    nodes = [node for node in captured.program.graph.nodes if node.name in found]
    kinds = [str(node.target).split(".")[1] for node in nodes]
    convolutions = [node.name for node in captured.program.graph.nodes if "conv2d" in str(node.target)]
    half = len(convolutions) // 2
    outer = {convolutions[0], convolutions[half - 1], convolutions[half], convolutions[-1]}
    assert {name for name in found if name in convolutions} == outer
    assert kinds.count("layer_norm") == kinds.count("silu") == 2


SHIFTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1, 4] x, float[4, 4] w, float[4] b, int64[2] row) => (float[1, 4] y) {
    h = MatMul (x, w)
    inner = MatMul (h, w)
    sum = Add (h, inner)
    bias = Reshape (b, row)
    shifted = Add (sum, bias)
    half = Constant <value = float {0.5}> ()
    moved = Add (shifted, half)
    y = MatMul (moved, w)
}
"""


def test_weights_and_constants_in_onnx_are_not_computed() -> None:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(SHIFTED))
    found = ends(ir.serde.deserialize_model(proto))
    assert [node.outputs[0].name for node in found] == ["h", "sum", "bias", "shifted", "moved", "y"]


def kind(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def test_a_small_network_has_the_same_ends_everywhere() -> None:
    checkpoint = load_checkpoint("python:tests.foreign_nets:Residual")
    plan = checkpoint.plan_for(1)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1)
    in_onnx = [node.op_type for node in ends(typed(exact_calls(program).model))]
    assert in_onnx == ["ConvTranspose", "Add", "Add", "Sigmoid", "ConvTranspose"]
    captured = capture(program, "float32")
    found = find_ends(captured)
    in_coreml = [kind(node) for node in captured.program.graph.nodes if node.name in found]
    assert in_coreml == ["conv_transpose2d", "add", "view", "add", "sigmoid", "conv_transpose2d"]
    emulation = emulate(checkpoint, plan, "fp16")
    in_emulation = [kind(node) for node in emulation.module.graph.nodes if node in emulation.ends]
    assert in_emulation == ["conv_transpose2d", "add", "reshape", "add", "sigmoid", "conv_transpose2d"]


def test_a_run_folder_is_emulated_as_it_ships(tiny: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    emulation = emulate(checkpoint, checkpoint.plan_for(2), "fp16")
    products = [node for node in emulation.module.graph.nodes if "conv2d" in str(node.target)]
    assert [node in emulation.ends for node in products] == [True, *[False] * (len(products) - 2), True]
    assert not emulate(checkpoint, checkpoint.plan_for(2), "int8").ends
