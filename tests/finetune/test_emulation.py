"""Tuning in a lower precision: the emulated chain is the artefact's, its gradient passes, its ranges ship."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.errors import UsageError
from mmd_export.noise import sampler_noise
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import FP8, FP16, GRIDS, HALVES, INT8
from mmd_export.precision.layers import fold_transposes
from mmd_export.precision.lower import lower, typed
from mmd_export.precision.quantise import Recipe, chosen_layers, quantise
from mmd_export.precision.trajectory import Calls
from mmd_export.target_options import TargetOptions
from mmd_export.tolerance import artefact_tolerance
from mmd_finetune.emulation import emulate
from mmd_finetune.fake_quantise import on_activation_grid, on_weight_grid, round_half
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.task import prepare
from mmd_finetune.trainable import Trainable, make_emulation, make_trainable
from tests.models import tiny_attention
from tests.older import needs
from tests.precisions import attention_calls, calls_of, run, whole

__all__ = ["attention_calls", "tiny_attention"]
STEPS = 2


def trainable(base: Checkpoint, precision: str, **values: Any) -> Trainable:
    settings = make_settings({"model": "digits", "steps": STEPS, "out": "unused", "precision": precision, **values})
    plan = base.plan_for(STEPS)
    return make_trainable(base, plan, settings, make_emulation(base, plan, settings))


@pytest.fixture(scope="module")
def eight_calls(tiny_attention: Path) -> Calls:
    return calls_of(tiny_attention, STEPS, batch=8)


@pytest.mark.parametrize("precision", ["int8", "fp8", "w4", "fp16"])
def test_the_emulated_chain_is_the_artefacts(precision: str, tiny_attention: Path, eight_calls: Calls) -> None:
    if precision == "fp8":
        needs("onnxruntime", "1.32", "float8 goes through Transpose, which opset 20 has not")
    base = load_checkpoint(tiny_attention)
    noise = sampler_noise(5, 8, base.shape, 0)["noise"]
    with torch.no_grad():
        chain = trainable(base, precision).sampler()
        ours = [state.numpy() for state in chain.chain(torch.from_numpy(noise.copy()))]
    model = whole(lower(eight_calls, precision))
    if precision in HALVES:
        model = emulated(model, HALVES[precision])
    theirs = run(model, {"noise": noise}, "state.1", "state.2")
    with torch.no_grad():
        exact = [state.numpy() for state in trainable(base, "fp32").sampler().chain(torch.from_numpy(noise.copy()))]
    for mine, shipped, unrounded in zip(ours, theirs, exact, strict=True):
        apart = np.abs(mine - shipped).max(axis=(1, 2, 3))
        cost = np.abs(shipped - unrounded).mean()
        assert apart.max() < artefact_tolerance("onnx", precision).atol
        if precision in GRIDS:  # equal but where the last bit of a sum decides a tie: that image is another then
            assert np.median(apart) < 1e-4 < cost
        else:  # one operation of torch is several in the graph: the error is of that size, not that error
            assert 0.5 < np.abs(mine - unrounded).mean() / cost < 2.0


@pytest.mark.parametrize("precision", ["w8", "fp16"])
def test_the_weights_of_a_users_module_are_tuned(precision: str) -> None:
    made = trainable(load_checkpoint("python:tests.foreign_nets:Plain"), precision)
    last = list(made.sampler().chain(torch.randn(2, 1, 8, 8)))[-1]
    last.square().mean().backward()
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in made.parameters())


@pytest.mark.parametrize("network", ["TiedFirst", "TiedLast"])
@pytest.mark.parametrize("precision", ["int8", "w4"])
def test_a_shared_weight_is_rounded_where_the_graph_rounds_it(precision: str, network: str) -> None:
    """For the layer inside, not for the first or the last one."""
    model = f"python:tests.foreign_nets:{network}"
    base = load_checkpoint(model)
    noise = sampler_noise(5, 8, base.shape, 0)["noise"]
    with torch.no_grad():
        chain = trainable(base, precision).sampler()
        ours = [state.numpy() for state in chain.chain(torch.from_numpy(noise.copy()))]
    shipped = whole(lower(calls_of(model, STEPS, batch=8), precision))
    theirs = run(shipped, {"noise": noise}, "state.1", "state.2", as_written=True)
    for mine, its in zip(ours, theirs, strict=True):
        assert np.median(np.abs(mine - its).max(axis=(1, 2, 3))) < 1e-4


@pytest.mark.parametrize("precision", ["int8", "fp8", "w8", "w4"])
def test_weights_are_those_that_the_graph_holds(precision: str, attention_calls: Calls) -> None:
    grid = GRIDS[precision]
    calls = replace(attention_calls, model=typed(attention_calls.model))
    fold_transposes(calls.model)
    chosen = chosen_layers(calls.model, Recipe())
    before = [np.moveaxis(layer.weight.const_value.numpy(), layer.axis, 0).copy() for layer in chosen]  # type: ignore[union-attr]
    kinds = [layer.convolution for layer in chosen]
    nodes, axes = [layer.node for layer in chosen], [layer.axis for layer in chosen]
    quantise(calls, grid, Recipe(), 2)
    watched = calls.model.clone()
    names = [str(node.inputs[1].name) for node in nodes]  # type: ignore[union-attr]
    made = {value.name: value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.extend(made[name] for name in names)
    feeds = {str(value.name): _example(value) for value in calls.model.graph.inputs}
    found = run(watched, feeds, *names)
    for array, convolution, axis, shipped in zip(before, kinds, axes, found, strict=True):
        used = replace(grid, largest=63.0) if grid == INT8 and not convolution else grid
        ours = on_weight_grid(torch.from_numpy(array), used).numpy()
        wrong = np.mean(ours != np.moveaxis(shipped, axis, 0))
        assert wrong <= (0.01 if precision == "w4" else 0.0)  # 4 bits: blocks with two scales of equal error


def _example(value: Any) -> np.ndarray[Any, Any]:
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    return np.full(shape, 0.1, np.float32)


@pytest.mark.parametrize(("grid", "kind"), [(INT8, onnx.TensorProto.INT8), (FP8, onnx.TensorProto.FLOAT8E4M3FN)])
def test_activations_are_rounded_as_quantize_linear_does(grid: Any, kind: int) -> None:
    scale = 0.03125
    x = np.concatenate([np.linspace(-5, 5, 4001), scale * (np.arange(-140, 141) + 0.5), 16 * np.linspace(-1, 1, 501)])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [onnx.helper.make_tensor("s", 1, [], [scale]), onnx.helper.make_tensor("z", kind, [], [0])]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [len(x)])], [value("y", 1, [len(x)])], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.astype(np.float32)})[0]
    ours = on_activation_grid(torch.from_numpy(x.astype(np.float32)), scale, grid).numpy()
    np.testing.assert_array_equal(ours, expected)


def test_gradients_pass_inside_and_stop_where_a_grid_clips() -> None:
    x = torch.tensor([-9.0, -1.0, 0.013, 2.0, 9.0], requires_grad=True)
    on_activation_grid(x, 0.05, INT8).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    roundings: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda w: on_weight_grid(w, GRIDS["w4"]),
        lambda w: round_half(w, FP16),
    )
    for rounded in roundings:
        weight = torch.randn(4, 16, requires_grad=True)
        value = rounded(weight)
        assert not torch.equal(value, weight)
        value.sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.ones_like(weight))


def test_beyond_the_range_of_16_bits_float32_is_kept() -> None:
    assert round_half(torch.tensor([1e5, 1.0 + 2e-4]), FP16).tolist() == [1e5, 1.0]


def test_the_folded_time_path_stays_float32(tiny_attention: Path) -> None:
    base = load_checkpoint(tiny_attention)
    emulation = emulate(base, base.plan_for(STEPS), "fp16")
    names = {str(node.target): node for node in emulation.module.graph.nodes if node.op == "get_attr"}
    folded = [name for name, node in names.items() if all(user in emulation.split.time for user in node.users)]
    assert any("time_embedding" in name for name in folded)
    assert not any("conv" in name for name in folded)
    with torch.no_grad():
        moved = {name: p + 1e-6 * p for name, p in base.denoiser.named_parameters()}
        x, timestep = torch.randn(2, *base.shape), torch.tensor([500])
        plain = dict(base.denoiser.named_parameters())
        same = emulation.run(plain, x, 0, timestep)
        inner = {name: moved[name] if name in folded else plain[name] for name in plain}
        assert not torch.equal(emulation.run({**plain, **{n: p * 2 for n, p in moved.items() if n in folded}}, x, 0,
                                             timestep), same)  # fmt: skip
        assert float((emulation.run(inner, x, 0, timestep) - same).abs().max()) < 1e-2


class Tied(nn.Module):
    """A product with a weight that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x) @ self.weight) + 0.0 * timestep
        return output


def test_a_product_that_tuning_cannot_follow_is_refused(tiny_attention: Path) -> None:
    base = load_checkpoint(tiny_attention)
    odd = replace(base, denoiser=Tied())
    with pytest.raises(UsageError, match=r"--precision w8: .* products with weights that tuning cannot follow"):
        emulate(odd, base.plan_for(STEPS), "w8")


@pytest.fixture(scope="module")
def int8_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits in int8."""
    out = tmp_path_factory.mktemp("runs") / "int8"
    values = {
        "model": "digits", "steps": STEPS, "out": out, "batch_size": 64, "iterations": 12, "evaluate_every": 4,
        "evaluate_count": 256, "learning_rate": 5e-4, "precision": "int8", "calibration": 4, "ema_decay": 0.5,
        "device": "cpu",
    }  # fmt: skip
    tune(make_settings(values))
    return out


def test_a_short_run_lowers_the_distance_of_the_emulated_sampler(int8_run: Path) -> None:
    result = json.loads((int8_run / "result.json").read_text())
    assert result["held_out_after"] < 0.8 * result["held_out_before"]


def test_the_run_folder_records_precision_and_ranges(int8_run: Path) -> None:
    tuned = load_checkpoint(int8_run).tuned_precision
    assert tuned is not None
    assert (tuned.precision, tuned.images) == ("int8", 4)
    parameters = dict(load_checkpoint(int8_run).denoiser.named_parameters())
    for layer in tuned.layers:
        assert parameters[layer.name].numel() == layer.size
        assert len(layer.scales) == STEPS
    assert len({layer.scales for layer in tuned.layers}) > 5


def test_the_artefact_has_the_tuned_ranges_and_gives_the_tuned_samples(int8_run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = BuildOptions(str(int8_run), "onnx", tmp_path / "bundle", precision="int8", batch="4")
    bundle = build(options, said.append)
    assert any("the ranges are those that it was tuned with" in line for line in said)
    assert not any("warning" in line for line in said)
    checkpoint = load_checkpoint(int8_run)
    assert checkpoint.tuned_precision is not None
    graph = onnx.load(bundle.artefact_path).graph
    scales = {float(to_array(each)) for each in graph.initializer if to_array(each).ndim == 0 and each.data_type == 1}
    assert {scale for layer in checkpoint.tuned_precision.layers for scale in layer.scales} <= scales
    recorded = json.loads((int8_run / "settings.json").read_text())["settings"]
    settings = FinetuneSettings.model_validate(recorded | {"out": tmp_path / "unused"})
    task = prepare(settings)
    noise = np.random.default_rng(5).standard_normal((25, *bundle.golden().noise[:4].shape)).astype(np.float32)
    tuned = _sampled(Trainable(checkpoint.denoiser, task.plan, None, task.emulation), noise)
    unrounded = _sampled(Trainable(checkpoint.denoiser, task.plan, None, None), noise)
    session = onnxruntime.InferenceSession(str(bundle.artefact_path), providers=["CPUExecutionProvider"])
    artefact = np.stack([session.run(None, {"noise": images})[0] for images in noise])
    assert np.abs(tuned - artefact).max() < artefact_tolerance("onnx", "int8").atol
    # Where the two round a value apart an image differs by a whole step, so the mean is over many images.
    assert np.abs(tuned - artefact).mean() < 0.1 * np.abs(artefact - unrounded).mean()


def _sampled(trained: Trainable, noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.stack([trained.sampler()(torch.from_numpy(images)).numpy() for images in noise])


def test_another_precision_than_the_tuned_one_is_warned_of(int8_run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    build(BuildOptions(str(int8_run), "onnx", tmp_path / "bundle", verify=False), said.append)
    assert any("warning: int8 was tuned for --precision int8, --precision is fp32" in line for line in said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"of_target": TargetOptions(calibration=8)}, "--calibration is 8, but the model was tuned with ranges"),
        ({"form": "loop"}, "use --form unrolled"),
    ],
)
def test_options_that_ask_for_other_ranges_are_refused(
    values: dict[str, Any], said: str, int8_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        build(BuildOptions(str(int8_run), "onnx", tmp_path / "bundle", precision="int8", verify=False, **values))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["layers"].pop(), r"ranges of \d+ layers, the graph quantises"),
        (lambda data: data["layers"][0]["scales"].pop(), "1 scales, the graph has .* and 2 calls"),
        (lambda data: data["layers"][0].update(scales=[0.0, 1.0]), "is not positive"),
        (lambda data: data.pop("precision"), "is damaged"),
    ],
)
def test_a_record_that_does_not_fit_is_said(change: Any, said: str, int8_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(int8_run, copy)
    data = json.loads((copy / "quantisation.json").read_text())
    change(data)
    (copy / "quantisation.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=said):
        build(BuildOptions(str(copy), "onnx", tmp_path / "bundle", precision="int8", verify=False))
