"""Target ``coreml``: what is in its packages, and that reference evaluation of them is the sampler."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.coreml import capture, half, probe
from mmd_export.coreml.convert import _without, coremltools
from mmd_export.errors import NotAvailableError, ParityError, UsageError
from mmd_export.network_options import NetworkOptions
from mmd_export.parity import ParityReport, check_artefact
from mmd_export.program import export_program
from mmd_export.reference import sampler_of
from mmd_export.runtime import RunOptions
from mmd_export.target_options import TargetOptions
from mmd_export.targets import CompileOptions, get_target
from mmd_runtime.coreml_reference import RUNTIME
from mmd_runtime.mil.evaluate import Evaluator
from mmd_runtime.mil.program import Program, Ref, Type, read_package
from tests.families import save_network

Built = Callable[..., Bundle]
IMAGE = (1, 1, 8, 8)


def program_of(bundle: Bundle) -> Program:
    return read_package(bundle.artefact_path)


def worst(bundle: Bundle) -> float:
    assert bundle.manifest.parity is not None
    return max(bundle.manifest.parity.values())


def test_weights_are_stored_once(built: Built, tiny: Path) -> None:
    weights = sum(value.numel() for value in load_checkpoint(tiny).denoiser.parameters())
    assert built(tiny).manifest.graph.unique_weight_bytes <= 4 * weights + 128 * 200


# precision, oldest system, opset and specification version of that system
PACKAGES = [("fp16", None, "CoreML7", 8), ("w8", "iOS16", "CoreML6", 7), ("w6", "macOS26", "CoreML9", 10),
            ("w4", "macOS15", "CoreML8", 9)]  # fmt: skip


@pytest.mark.parametrize(("precision", "system", "opset", "version"), PACKAGES)
def test_state_and_interface_stay_float32(
    built: Built, tiny: Path, precision: str, system: str | None, opset: str, version: int
) -> None:
    bundle = built(tiny, precision=precision, system=system)
    program = program_of(bundle)
    types = Evaluator(program).types
    assert {feature.kind for feature in program.features} == {"fp32"}
    assert types["noise"] == types["sample"] == types["state_1"] == Type("fp32", IMAGE)
    half = {op.kind for op in program.ops if op.outputs[0][1].dtype == "fp16"}
    assert {"conv", "layer_norm"} <= half
    single = [op.kind for op in program.ops if op.outputs[0][1].dtype == "fp32" and op.kind not in ("const", "cast")]
    steps = bundle.golden().steps
    assert single.count("conv") == 2 * steps  # what reads the state, and what gives the output
    assert single.count("layer_norm") == steps
    of_values = {kind for kind in single if not kind.startswith("constexpr")}
    assert of_values <= {"add", "mul", "clip", "sub", "conv", "layer_norm", "reshape", "silu"}
    assert (program.opset, program.version) == (opset, version)
    assert bundle.manifest.hardware == {"deployment_target": system or "iOS17", "compute_units": "all"}


@pytest.mark.parametrize(("precision", "system"), [("fp16", None), ("w4", "macOS15")])
def test_two_levels_and_attention(built: Built, tiny_attention: Path, precision: str, system: str | None) -> None:
    """Images are halved and doubled in half precision and with palettes too, within the tolerance."""
    bundle = built(tiny_attention, precision=precision, system=system)
    assert {"conv", "upsample_nearest_neighbor"} <= {op.kind for op in program_of(bundle).ops}
    assert worst(bundle) <= bundle.manifest.tolerance.atol


def test_each_precision_is_smaller_and_further_off(built: Built, tiny: Path) -> None:
    bundles = [built(tiny), *(built(tiny, precision=name, system=system) for name, system, _, _ in PACKAGES)]
    sizes = [bundle.manifest.graph.unique_weight_bytes for bundle in bundles]
    assert sizes == sorted(sizes, reverse=True)
    errors = [worst(bundle) for bundle in bundles]
    assert errors[0] < errors[1] < errors[2] < errors[4]
    assert errors[1] <= 1e-2
    packed = [{kind for kind in bundle.manifest.graph.op_counts if "constexpr" in kind} for bundle in bundles]
    assert packed[2:] == [{"constexpr_affine_dequantize"}, {"constexpr_lut_to_dense"}, {"constexpr_lut_to_dense"}]


def test_bytes_are_a_picture(built: Built, tiny: Path) -> None:
    bundle = built(tiny, output="uint8")
    assert [feature.kind for feature in program_of(bundle).features] == ["fp32", "grayscale"]
    assert bundle.manifest.spec("sample").shape == (1, 8, 8, 1)
    assert (bundle.manifest.parity or {})["sample"] <= 1.0
    assert bundle.golden().sample.dtype == np.uint8


def test_what_no_picture_holds_is_refused(tiny: Path, tiny_attention: Path, latent: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(tiny), target="coreml", out=tmp_path / "out", steps=2, output="uint8")
    stages: list[str] = []
    for wrong in (replace(options, batch="2"), replace(options, model=str(tiny_attention))):
        with pytest.raises(NotAvailableError, match=r"one picture of 1 or 3 channels, asked are \d of \d"):
            build(wrong, stages.append)
    with pytest.raises(NotAvailableError, match="asked are 2 of 3"):  # channels of the image, its latent has 4
        build(replace(options, model=str(latent), decode=True, batch="2"), stages.append)
    assert stages == ["reading the checkpoint"] * 3
    with pytest.raises(NotAvailableError, match="one batch size an artefact, --batch is 1,2"):
        build(replace(options, batch="1,2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TargetOptions(deployment_target="iOS15"), "--deployment-target 'iOS15' is unknown; known: iOS16, .*macOS15"),
        (TargetOptions(compute_units="gpu"), "--compute-units 'gpu' is unknown; known: all, cpu, cpu-gpu, cpu-ane"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_read(
    tmp_path: Path, options: TargetOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(
            BuildOptions(
                model=str(tmp_path / "none"), target="coreml", out=tmp_path / "out", steps=2, of_target=options
            )
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "decode", "most"), [("fp32", False, 1e-4), ("fp16", True, 1e-2)])
def test_latents_and_their_decoder(built: Built, latent: Path, precision: str, decode: bool, most: float) -> None:
    bundle = built(latent, precision=precision, decode=decode)
    assert worst(bundle) <= most
    assert bundle.gives_latents is not decode
    assert Evaluator(program_of(bundle)).types["sample"].shape == ((1, 3, 16, 16) if decode else (1, 4, 8, 8))


def test_a_decoder_behind_half_precision_is_float32(built: Built, latent: Path) -> None:
    bundle = built(latent, precision="fp16", decode=True)
    program, last = program_of(bundle), f"state_{bundle.golden().steps}"
    behind = {last}
    types: dict[bool, set[str]] = {True: set(), False: set()}  # of convolutions, behind the last state or before
    for op in program.ops:
        read = {given.name for several in op.inputs.values() for given in several if isinstance(given, Ref)}
        if not read.isdisjoint(behind):
            behind |= {name for name, _ in op.outputs}
        if op.kind == "conv":
            types[not read.isdisjoint(behind)].add(op.outputs[0][1].dtype)
    assert types == {True: {"fp32"}, False: {"fp16", "fp32"}}
    found = Evaluator(program).run({"noise": bundle.golden().noise[:1]}, [last, "sample"])
    decoder = load_checkpoint(latent).decoder
    assert decoder is not None
    with torch.inference_mode():
        image = decoder(torch.from_numpy(found[last])).clamp(-1, 1).numpy()
    np.testing.assert_allclose(found["sample"], image, rtol=0, atol=1e-5)


def test_names_that_the_converter_changes_are_kept_all_the_same() -> None:
    def op(name: str, result: str, *reads: str) -> Any:
        given = [SimpleNamespace(name=each) for each in reads]
        return SimpleNamespace(name=name, outputs=[SimpleNamespace(name=result)], get_flattened_inputs=lambda: given)

    ops = [
        op("_inversed_div", "_inversed_div", "x"), op("linear_0", "linear", "_inversed_div"), op("inner", "inner", "x"),
        op("add", "state_1", "linear", "inner"), op("transpose_0", "t", "state_1"), op("y", "y", "t"),
    ]  # fmt: skip
    for each in ops:
        each.enclosing_block = SimpleNamespace(operations=ops)
    keep = half.Float32(frozenset({"div", "linear"}), "state_1")
    assert [each.name for each in ops if each not in keep] == ["inner", "add"]


def test_what_the_decoder_is_called_makes_it_no_network() -> None:
    node = fx.Graph().placeholder("x")
    for path, inside in (("sampler.sampler.denoiser", True), ("sampler.sampler.decoder", False), ("sampler", False)):
        node.meta["nn_module_stack"] = {"a": (path, nn.Module)}
        assert capture._in_network(node) is inside


def test_a_transformer_with_text(built: Built, tmp_path: Path) -> None:
    """Casts that do nothing and the tanh form of gelu, both of which coremltools 9.0 would get wrong."""
    bundle = built(save_network(tmp_path / "sd3", "sd3"))
    assert worst(bundle) <= 1e-5
    assert {"tanh", "softmax", "layer_norm"} <= set(bundle.manifest.graph.op_counts)


# --- half precision where it does not reach


def test_norms_beyond_half_precision_are_computed_in_float32(built: Built, wild: Path) -> None:
    bundle = built(wild, precision="fp16", steps=2)
    assert worst(bundle) <= 1e-2
    norms = [op.outputs[0][1].dtype for op in program_of(bundle).ops if op.kind == "layer_norm"]
    assert {"fp32", "fp16"} == set(norms)


def test_sinusoids_of_sizes_are_computed_in_float32(tmp_path: Path, built: Built) -> None:
    """PixArt's resolution and aspect ratio: cos(1024 f) of 128 frequencies f, of which 16 bits give another number."""
    model = str(save_network(tmp_path / "pixart", "pixart"))
    network = NetworkOptions(text_length=4)
    bundle = build(BuildOptions(model, "coreml", tmp_path / "out", "fp16", steps=1, verify=False, network=network))
    program = program_of(bundle)
    (name,) = (op.outputs[0][0] for op in program.ops if op.kind == "cos" and op.outputs[0][1].shape == (2, 128))
    sizes = np.array([[1024.0, 1000.0]], np.float32)
    found = Evaluator(program).run({"resolution": sizes}, [name])[name]
    phases = sizes.T.astype(np.float64) * np.exp(-np.log(1e4) * np.arange(128) / 128)
    np.testing.assert_allclose(found, np.cos(phases), rtol=0, atol=2e-4)  # of float32, whose phases are 6e-5 off


def test_without_the_repair_they_are_finite_and_wrong(
    wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built
) -> None:
    for find in ("find_islands", "find_ends"):
        monkeypatch.setattr(probe, find, lambda *_: frozenset())
    options = BuildOptions(
        model=str(wild), target="coreml", out=tmp_path / "out", steps=2, precision="fp16", verify=False
    )
    bundle = build(options)
    golden = bundle.golden()
    sample = Evaluator(program_of(bundle)).run({"noise": golden.noise[:1]}, ["sample"])["sample"]
    assert np.isfinite(sample).all()
    assert np.abs(sample - golden.sample[:1]).max() > 0.05
    with pytest.raises(ParityError, match=r"rung 6 .* the tolerance is 0.0"):
        ParityReport(bundle.name, RUNTIME.name, (check_artefact(bundle, RUNTIME, RunOptions()),)).require()


class Odd(nn.Module):
    """An op that coremltools does not know."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.special.bessel_j0(x)
        return y + timestep.float()


def test_an_op_that_cannot_be_converted_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path, built: Built) -> None:
    program = export_program(Odd(), tiny_checkpoint.plan_for(1), tiny_checkpoint.shape, 1)
    with pytest.raises(NotAvailableError, match=r"coremltools cannot convert it: .*bessel_j0.*; use --target onnx"):
        get_target("coreml").compile(program, tmp_path, CompileOptions())


class Exploding(nn.Module):
    """Not finite from the second step on."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (100.0 * x).exp().exp() + timestep.float()


def test_a_trajectory_that_is_not_finite_is_refused(tiny_checkpoint: Checkpoint) -> None:
    checkpoint = replace(tiny_checkpoint, denoiser=Exploding())
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, 1)
    captured = capture.capture(program, "float32")
    with pytest.raises(UsageError, match="the sampler is not finite at"):
        probe.find_islands(captured.program, program)


# --- the graph that is converted


def test_norm_and_attention_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    x, gamma, beta = (torch.randn(shape, generator=draw) for shape in ((2, 6, 4, 5), (6,), (6,)))
    expected = nn.functional.group_norm(x, 3, gamma, beta, 1e-3)
    torch.testing.assert_close(capture.group_norm(x, 3, gamma, beta, 1e-3), expected)
    q, k, v, bias = (torch.randn(shape, generator=draw) for shape in ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), (4, 5)))
    attend = nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(capture.attention(q, k, v, bias, scale=0.3), attend(q, k, v, bias, scale=0.3))
    keep = bias > 0
    keep[:, 0] = True
    torch.testing.assert_close(capture.attention(q, k, v, keep), attend(q, k, v, keep))
    torch.testing.assert_close(capture.gelu(x), nn.functional.gelu(x, approximate="tanh"))
    with pytest.raises(NotAvailableError, match="causal"):
        capture.attention(q, k, v, is_causal=True)


def test_states_are_named_and_the_plan_is_told_from_the_network(tiny_checkpoint: Checkpoint) -> None:
    plan = tiny_checkpoint.plan_for(3)
    program = export_program(tiny_checkpoint.denoiser, plan, tiny_checkpoint.shape, 1)
    captured = capture.capture(program, "float32")
    graph = captured.program.graph
    names = {node.name: node for node in graph.nodes}
    assert {"state_1", "state_2", "state_3"} <= captured.plan <= set(names)
    assert len(graph.output_node().args[0]) == 1
    targets = {str(names[name].target) for name in captured.plan}
    assert targets <= {"aten.mul.Tensor", "aten.add.Tensor", "aten.hardtanh.default"}
    assert not any("conv" in str(names[name].target) for name in captured.plan)
    noise = torch.randn(1, *tiny_checkpoint.shape)
    with torch.no_grad():
        (sample,) = fx.Interpreter(captured.program.graph_module).run(*probe.lifted(captured.program), noise)
        torch.testing.assert_close(sample, sampler_of(tiny_checkpoint, plan)(noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("constant", "wanted"), [(6e4, "fp16"), (7e4, "fp32"), (-7e4, "fp32"), (np.inf, "fp16")])
def test_a_constant_beyond_half_precision_stays_float32(constant: float, wanted: str) -> None:
    ct = coremltools()
    half.register()
    builder = importlib.import_module("coremltools.converters.mil").Builder
    registry = importlib.import_module("coremltools.converters.mil.mil.passes.pass_registry").PASS_REGISTRY

    def added(x: object) -> object:
        return builder.add(x=x, y=np.array([1.0, constant], np.float32))

    program = builder.program(input_specs=[builder.TensorSpec(shape=(2,))], opset_version=ct.target.iOS17)(added)
    registry[half.PASS](program)
    (add,) = program.functions["main"].find_ops(op_type="add")
    assert {str(var.dtype.__name__) for var in (add.x, add.y)} == {wanted}


def test_a_package_in_hiding_is_not_found_and_comes_back() -> None:
    name = "colorsys"
    sys.modules.pop(name, None)
    with _without((name, "sys")), pytest.raises(ImportError):
        importlib.import_module(name)
    assert importlib.import_module(name).ONE_THIRD
    with _without((name,)):
        assert importlib.import_module(name).ONE_THIRD  # in use already
