"""The ONNX artefact: right, small, clean, and the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.errors import NotAvailableError
from mmd_export.onnx_compose import GraphSpec, compose
from mmd_export.onnx_lint import faults, report, require_clean
from mmd_export.onnx_translate import translate
from mmd_export.plan import StepPlan
from mmd_export.program import export_program
from mmd_export.reference import golden_inputs, run_chain, sampler_of, to_uint8
from mmd_export.targets import Compiled, CompileOptions, get_target
from mmd_export.targets.onnx import save
from tests.models import weights_of

ROOT = Path(__file__).parents[2]
Build: TypeAlias = "Callable[..., Artefact]"


@dataclass(frozen=True)
class Artefact:
    """One compiled file and what it was made of."""

    path: Path
    checkpoint: Checkpoint
    plan: StepPlan
    compiled: Compiled
    proto: ModelProto

    @property
    def batch(self) -> int:
        """Of the static graph; 0 if any."""
        return int(self.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value)

    @property
    def nodes(self) -> int:
        return len(self.proto.graph.node)

    def run(self, inputs: dict[str, np.ndarray[Any, Any]], *names: str) -> list[np.ndarray[Any, Any]]:
        """Values by name, intermediate ones too."""
        opened = ModelProto()
        opened.CopyFrom(self.proto)
        shape = [None, *self.checkpoint.shape]
        for name in set(names) - {"sample"}:
            opened.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(opened.SerializeToString(), settings, ["CPUExecutionProvider"])
        found: list[np.ndarray[Any, Any]] = session.run(list(names), inputs)
        return found


@pytest.fixture(scope="module")
def build(tiny: Path, tiny_attention: Path, tiny_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile once for the whole file: (model, steps, eta, batch, output)."""
    folders = {"tiny": tiny, "attention": tiny_attention, "labels": tiny_labels}

    @cache
    def compiled(
        model: str = "tiny", steps: int = 2, eta: float | None = None, batch: int | None = 1, output: str = "float32"
    ) -> Artefact:
        checkpoint = load_checkpoint(folders[model])
        plan = checkpoint.plan_for(steps, eta=eta)
        program = export_program(checkpoint.denoiser, plan, checkpoint.shape, batch, checkpoint.conditions)
        folder = tmp_path_factory.mktemp(f"{model}-{steps}")
        facts = get_target("onnx").compile(program, folder, CompileOptions(output=output))
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
        return Artefact(folder / "model.onnx", checkpoint, plan, facts, onnx.load(folder / "model.onnx"))

    return compiled


CASES: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "stochastic, any batch": {"steps": 3, "eta": 1.0, "batch": None},
    "attention, oblong": {"model": "attention", "steps": 2},
    "class-conditional ddpm, any batch": {"model": "labels", "steps": 3, "batch": None},
    "uint8": {"output": "uint8", "eta": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_reference_computes(build: Build, case: str) -> None:
    made = build(**CASES[case])
    inputs = golden_inputs(made.checkpoint, made.plan, 1 if CASES[case].get("batch", 1) else 3)
    exact = run_chain(sampler_of(made.checkpoint.as_double(), made.plan), inputs, torch.float64)
    names = [f"state.{k}" for k in range(1, made.plan.step_count + 1)]
    sample, *states = made.run(inputs, "sample", *names)
    for name, state in zip(names, states, strict=True):
        np.testing.assert_allclose(state, exact[name], rtol=0, atol=1e-5)
        assert float(np.abs(state).mean()) < 3  # of unit scale: nothing blew up and saturated
    if made.compiled.graph and CASES[case].get("output") == "uint8":
        (last,) = made.run(inputs, names[-1])
        np.testing.assert_array_equal(sample, to_uint8(np.clip(last, -1, 1)))
        assert np.abs(sample.astype(int) - to_uint8(exact["sample"])).max() <= 1
    else:
        np.testing.assert_allclose(sample, exact["sample"], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(sample, np.clip(states[-1], -1, 1))


@pytest.mark.parametrize("case", CASES)
def test_the_outside_of_the_graph(build: Build, case: str) -> None:
    made, options = build(**CASES[case]), CASES[case]
    graph, batch = made.proto.graph, "batch" if options.get("batch", 1) is None else 1
    image = [batch, *made.checkpoint.shape]
    expected: dict[str, tuple[int, list[Any]]] = {"noise": (TensorProto.FLOAT, image)}
    if made.plan.noisy_steps:
        expected["step_noise"] = (TensorProto.FLOAT, [made.plan.noisy_steps, *image])
    if made.checkpoint.classes is not None:
        expected["class_labels"] = (TensorProto.INT64, [batch])
    assert {value.name: spec(value) for value in graph.input} == expected
    channels, height, width = made.checkpoint.shape
    uint8 = (TensorProto.UINT8, [batch, height, width, channels])
    assert [value.name for value in graph.output] == ["sample"]
    assert spec(graph.output[0]) == (uint8 if options.get("output") == "uint8" else (TensorProto.FLOAT, image))


def spec(value: onnx.ValueInfoProto) -> tuple[int, list[Any]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


@pytest.mark.parametrize("case", CASES)
def test_it_is_clean(build: Build, case: str) -> None:
    made = build(**CASES[case])
    onnx.checker.check_model(str(made.path), full_check=True)
    assert faults(ir.from_proto(made.proto), made.checkpoint.conditions) == []
    assert [(opset.domain, opset.version <= 20) for opset in made.proto.opset_import] == [("", True)]
    assert made.proto.ir_version <= 10
    assert not made.proto.functions
    assert not made.proto.metadata_props
    assert not made.proto.doc_string
    for part in (made.proto.graph, *made.proto.graph.node, *made.proto.graph.initializer, *made.proto.graph.value_info):
        assert not part.doc_string
        assert not part.metadata_props if hasattr(part, "metadata_props") else True
    ops = {node.op_type for node in made.proto.graph.node}
    assert not ops & {"Constant", "Identity", "Dropout", "If", "Loop", "Scan", "RandomNormalLike", "Sin", "Cos"}
    values = {name for node in made.proto.graph.node for name in node.output}
    steps = range(made.plan.step_count)
    assert {f"state.{k + 1}" for k in steps} | {f"output.{k}" for k in steps} | {f"clean.{k}" for k in steps} <= values
    data = made.path.read_bytes()
    for private in (str(ROOT), str(Path.home()), sys.prefix, "/tmp/", "site-packages", ".py", "pkg.torch", "timestep"):
        assert private.encode() not in data, private


@pytest.mark.parametrize("case", CASES)
def test_it_is_small(build: Build, case: str) -> None:
    made = build(**CASES[case])
    facts = report(ir.from_proto(made.proto), made.batch or 1)
    folded = {"folded_values", "folded_bytes"}
    told = {key: value for key, value in made.compiled.graph.items() if key not in folded}
    assert told == facts.to_dict() | {"device": None}  # made for any device
    assert made.compiled.graph["folded_values"] >= made.plan.step_count  # at least one row a call
    assert facts.peak_activation_bytes > 2 * 4 * np.prod(made.checkpoint.shape)
    assert facts.nodes == made.nodes == sum(facts.op_counts.values())
    weights = sum(tensor.numel() * 4 for tensor in weights_of(made.checkpoint.folder).values())
    assert facts.unique_weight_bytes <= 1.05 * weights + 2048 * made.plan.step_count
    assert made.path.stat().st_size <= 1.05 * facts.unique_weight_bytes + 2048 * made.nodes


def test_weights_are_stored_once(build: Build) -> None:
    two, six = build(steps=2), build(steps=6)
    assert six.nodes > 2.9 * two.nodes
    grown = six.path.stat().st_size - two.path.stat().st_size
    assert 0 < grown <= 2048 * (six.nodes - two.nodes)
    data = six.path.read_bytes()
    large = [
        tensor for name, tensor in weights_of(six.checkpoint.folder).items() if "conv" in name and tensor.dim() == 4
    ]
    assert len(large) > 10
    for tensor in large:
        assert data.count(tensor.numpy().tobytes()) == 1
    names = [tensor.name for tensor in six.proto.graph.initializer]
    assert len(names) == len(set(names))


def test_calls_share_their_weights_before_equal_ones_are_merged(tiny: Path) -> None:
    """The merging pass leaves large tensors alone, so composing must not copy them in the first place."""
    checkpoint = load_checkpoint(tiny)
    plan = checkpoint.plan_for(3)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1)
    constants = [[value.numpy() for value in program.constants(k)] for k in range(3)]
    model = compose(translate(program.step), plan, constants, GraphSpec(checkpoint.shape))
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    weights = sum(tensor.numel() * 4 for tensor in weights_of(checkpoint.folder).values())
    assert sum(sizes) <= 1.02 * weights + 1024 * 3


# --- the same bytes


def test_two_builds_are_identical(build: Build) -> None:
    first, again = build(steps=2), build.__wrapped__(steps=2)  # type: ignore[attr-defined]
    assert first.path != again.path
    assert first.path.read_bytes() == again.path.read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from mmd_export.checkpoint import load_checkpoint
from mmd_export.program import export_program
from mmd_export.targets import CompileOptions, get_target
checkpoint = load_checkpoint(sys.argv[1])
program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, 1, checkpoint.conditions)
get_target("onnx").compile(program, Path(sys.argv[2]), CompileOptions())
"""


def test_another_process_builds_the_same_bytes(build: Build, tiny: Path, tmp_path: Path) -> None:
    """With another seed of Python's string hashes, so that no set or dict order can decide a byte."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tiny), str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (tmp_path / "model.onnx").read_bytes() == build(steps=2).path.read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8"])
def test_a_call_that_is_translated_once_compiles_twice(
    precision: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """To the bytes of one that is translated each time: no compilation changes what the next one starts from."""
    program = export_program(tiny_checkpoint.denoiser, tiny_checkpoint.plan_for(1), tiny_checkpoint.shape, 1)
    once = replace(program, translated=translate(program.step))
    found = []
    for number, each in enumerate((program, once, once)):
        (folder := tmp_path / str(number)).mkdir()
        get_target("onnx").compile(each, folder, CompileOptions(precision))
        found.append((folder / "model.onnx").read_bytes())
    assert found[0] == found[1] == found[2]


# --- the lint finds what is planted


def node(op: str, **attributes: Any) -> Callable[[ModelProto], None]:
    def plant(proto: ModelProto) -> None:
        planted = helper.make_node(op, ["noise"], ["planted"], name="planted", **attributes)
        proto.graph.node.append(planted)

    return plant


def float64_node(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Cast", ["noise"], ["planted"], name="planted", to=TensorProto.DOUBLE))
    proto.graph.value_info.append(helper.make_tensor_value_info("planted", TensorProto.DOUBLE, [1]))


def float64_weight(proto: ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "planted"))


def extra_input(proto: ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("timestep", TensorProto.INT64, [1]))


def float64_input(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def node_metadata(proto: ModelProto) -> None:
    entry = proto.graph.node[3].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", "/home/me/net.py"


def node_doc(proto: ModelProto) -> None:
    proto.graph.node[3].doc_string = "/home/me/net.py"


def model_metadata(proto: ModelProto) -> None:
    helper.set_model_props(proto, {"author": "me"})


def graph_doc(proto: ModelProto) -> None:
    proto.graph.doc_string = "me"


def function(proto: ModelProto) -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    proto.functions.append(helper.make_function("local", "f", ["x"], ["y"], body, [helper.make_opsetid("", 20)]))


def loop(proto: ModelProto) -> None:
    empty = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("Loop", ["", ""], [], name="planted", body=empty))


def branch(proto: ModelProto) -> None:
    empty = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("If", ["noise"], [], name="planted", then_branch=empty, else_branch=empty))


FAULTS: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "RandomNormalLike": (node("RandomNormalLike"), "node 'planted' (RandomNormalLike)"),
    "RandomUniformLike": (node("RandomUniformLike"), "node 'planted' (RandomUniformLike)"),
    "Bernoulli": (node("Bernoulli"), "node 'planted' (Bernoulli)"),
    "Dropout": (node("Dropout"), "node 'planted' (Dropout)"),
    "Loop": (loop, "node 'planted' (Loop)"),
    "If": (branch, "node 'planted' (If)"),
    "a custom domain": (node("FusedConv", domain="com.microsoft"), "of the custom domain 'com.microsoft'"),
    "a float64 value": (float64_node, "float64 value 'planted'"),
    "a float64 weight": (float64_weight, "float64 weight 'planted'"),
    "a float64 input": (float64_input, "float64 input 'noise'"),
    "a timestep input": (extra_input, "input 'timestep' (a timestep?)"),
    "node metadata": (node_metadata, "metadata on node"),
    "a node's doc string": (node_doc, "metadata on node"),
    "model metadata": (model_metadata, "metadata on the model"),
    "a graph's doc string": (graph_doc, "metadata on the model"),
    "a function": (function, "1 model-local functions"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_finds(build: Build, fault: str) -> None:
    plant, phrase = FAULTS[fault]
    proto = ModelProto()
    proto.CopyFrom(build(steps=1).proto)
    plant(proto)
    model = ir.from_proto(proto)
    found = faults(model)
    assert len(found) == 1, found
    assert phrase in found[0]
    with pytest.raises(NotAvailableError, match=r"the ONNX graph holds .*; a static sampler graph may not"):
        require_clean(model)


def test_a_graph_that_fails_the_checker_is_refused(build: Build, tmp_path: Path) -> None:
    proto = ModelProto()
    proto.CopyFrom(build(steps=1).proto)
    proto.graph.node.append(helper.make_node("Add", ["noise", "nowhere"], ["planted"], name="planted"))
    with pytest.raises(NotAvailableError, match=r"fails onnx.checker: .*nowhere"):
        save(ir.from_proto(proto), tmp_path / "model.onnx")
