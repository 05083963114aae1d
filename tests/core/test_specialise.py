"""The time path is folded: same numbers, nothing of it left. What cannot be a static graph is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmd_export.checkpoint import load_checkpoint
from mmd_export.checkpoints.gradient import GradientDenoiser
from mmd_export.checkpoints.static import Signature
from mmd_export.conditions import class_condition
from mmd_export.decoder import LatentDecoder
from mmd_export.denoiser import AtTimesteps, DiffusersUNet, typical_timestep
from mmd_export.errors import UsageError
from mmd_export.program import SamplerProgram, export_decoder, export_program
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.specialise import SpecialisedDenoiser, capture, export_call, specialise
from mmd_export.targets import CompileOptions, get_target
from tests.models import ATTENTION, LABELS, TWO_CHANNELS, TWO_LEVELS, new_unet

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {**ATTENTION, **TWO_CHANNELS},
    "labels": LABELS,
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "fourier": {"time_embedding_type": "fourier"},
    "ddpm": {
        **TWO_LEVELS,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
    },
}


def example(model: str, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(batch)
    shape = (2, 8, 12) if model == "attention" else (1, 8, 8)
    labels = {"class_labels": torch.randint(0, 5, (batch,), generator=generator)} if model == "labels" else {}
    return torch.randn(batch, *shape, generator=generator), labels


def timesteps_of(model: str) -> tuple[float, ...]:
    """The Fourier embedding takes the logarithm of the timestep."""
    return (999.0, 501.0, 20.5, 1.0 if model == "fourier" else 0.0)


def denoiser_of(model: str) -> nn.Module:
    return DiffusersUNet(new_unet(3, **MODELS[model])).eval()


def specialised(model: str, denoiser: nn.Module, batch: int | None) -> SpecialisedDenoiser:
    x, labels = example(model, batch or 2)
    return specialised_at(denoiser, timesteps_of(model), x, labels, dynamic_batch=batch is None)


def specialised_at(
    denoiser: nn.Module,
    timesteps: Sequence[float],
    x: Tensor,
    labels: Mapping[str, Tensor] | None = None,
    *,
    dynamic_batch: bool,
) -> SpecialisedDenoiser:
    given = labels or {}
    call = export_call(denoiser, typical_timestep(timesteps), x, given, dynamic_batch=dynamic_batch)
    return specialise(call, timesteps, tuple(given))


@pytest.mark.parametrize(
    ("model", "batch"),
    [*((model, batch) for model in MODELS for batch in (1, None)), ("attention", 3), ("labels", 3), ("scale_shift", 3)],
)
def test_it_equals_the_plain_denoiser(model: str, batch: int | None) -> None:
    denoiser, timesteps = denoiser_of(model), timesteps_of(model)
    special, plain = specialised(model, denoiser, batch), AtTimesteps(denoiser, timesteps)
    assert special.names == (("class_labels",) if model == "labels" else ())
    outputs = []
    with torch.no_grad():
        for size in (batch,) if batch else (1, 2, 5):
            x, labels = example(model, size)
            for k in range(len(timesteps)):
                expected, found = plain(x, k, **labels), special(x, k, **labels)
                assert found.shape == x.shape
                assert float((found - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))
                outputs.append(found)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3  # the timestep matters


def time_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Every parameter that only the timestep reaches."""
    parts = ("time_embedding", "time_proj", "time_emb_proj")
    found: dict[str, Tensor] = {
        name: p for name, p in denoiser.named_parameters() if any(part in name for part in parts)
    }
    assert len(found) >= 4
    return found


class Stepwise(nn.Module):
    """Looks its numbers up by the whole part of the timestep; traced for integers, it holds no cast."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(10.0))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x * self.get_buffer("table")[timestep.long().clamp(0, 9)]


@pytest.mark.parametrize("timesteps", [(7.0, 2.5), (2.5, 7.0), (7.0, 2.0)])
def test_whole_and_fractional_timesteps_in_one_plan(timesteps: tuple[float, ...]) -> None:
    x, _ = example("plain", 2)
    traced = GradientDenoiser(Stepwise(), Signature((1, 8, 8)), "stepwise")
    plain, folded = AtTimesteps(Stepwise(), timesteps), specialised_at(traced, timesteps, x, dynamic_batch=True)
    for k in range(len(timesteps)):
        assert torch.equal(folded(x, k), plain(x, k))


class Timeless(nn.Module):
    """A drift that is the same at every step, as of a gradient flow."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # noqa: ARG002 - the signature of a denoiser
        return torch.tanh(x)


@pytest.mark.parametrize("batch", [2, None])
def test_a_network_that_ignores_the_timestep_has_nothing_to_fold(batch: int | None) -> None:
    x, _ = example("plain", 2)
    special = specialised_at(Timeless(), (7.0, 2.0), x, dynamic_batch=batch is None)
    assert [special.constants(k) for k in range(2)] == [[], []]
    assert torch.equal(special(x, 1), torch.tanh(x))


@pytest.mark.parametrize("batch", [1, 3, None])
def test_nothing_of_the_time_path_is_left(batch: int | None) -> None:
    denoiser = denoiser_of("plain")
    special = specialised("plain", denoiser, batch)
    used = {str(node.target) for node in special.body.graph.nodes if node.op == "get_attr"}
    expected = {f"unet.{name}" for name, _ in denoiser.get_submodule("unet").named_parameters()}
    folded = set(time_weights(denoiser))
    assert {name.removeprefix("self_module.") for name in used} == expected - folded
    assert {name for name, _ in special.body.named_parameters()} == used
    ops = {str(node.target) for node in special.body.graph.nodes if node.op == "call_function"}
    assert not any(op.startswith(("aten.sin", "aten.cos", "aten.linear", "aten.arange", "aten.exp.")) for op in ops), (
        ops
    )
    assert next(node.name for node in special.body.graph.nodes if node.op == "placeholder") == "x"
    assert "timestep" not in {node.name for node in special.body.graph.nodes}


def test_only_what_labels_reach_stays_with_labels() -> None:
    denoiser = denoiser_of("labels")
    special = specialised("labels", denoiser, None)
    used = {str(node.target) for node in special.body.graph.nodes if node.op == "get_attr"}
    assert any("class_embedding" in name for name in used)
    assert any("time_emb_proj" in name for name in used)  # behind time + label
    assert not any("time_embedding" in name for name in used)


def test_a_row_is_stored_once_for_a_whole_batch() -> None:
    """A resnet adds its time row to the state by broadcasting, so a batch of 3 needs one row."""
    one, three = (specialised("plain", denoiser_of("plain"), batch) for batch in (1, 3))
    sizes = [sum(value.numel() for value in special.constants(0)) for special in (one, three)]
    assert sizes[0] == sizes[1] > 0
    assert len(one.constants(0)) == 5  # one a resnet


def test_the_artefact_holds_no_time_weights(tiny: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, None)
    get_target("onnx").compile(program, tmp_path, CompileOptions())
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer]
    folded = {tuple(p.shape) for p in time_weights(checkpoint.denoiser).values() if p.dim() == 2}
    assert folded == {(32, 8), (32, 32), (8, 32)}
    assert not folded & {tuple(reversed(shape)) for shape in shapes}
    assert not folded & set(shapes)
    assert not any("time_emb" in tensor.name for tensor in graph.initializer)
    assert not {"Sin", "Cos", "Gemm", "Exp"} & {node.op_type for node in graph.node}


def test_the_program_runs_as_the_specialised_network() -> None:
    denoiser = denoiser_of("labels")
    plan = make_plan(SchedulerConfig(prediction_type="v_prediction"), 3)
    program = export_program(denoiser, plan, (1, 8, 8), None, class_condition(5))
    runner, plain = program.runner(), AtTimesteps(denoiser, plan.timesteps)
    x, labels = example("labels", 5)
    with torch.no_grad():
        for k in range(3):
            torch.testing.assert_close(runner(x, k, **labels), plain(x, k, **labels), rtol=0, atol=5e-6)


# --- what is refused

Body = Callable[[Tensor], Tensor]  # modules too


class Net(nn.Module):
    """A convolution whose output goes through ``body``."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.body = body

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.body(self.conv(x) + torch.sin(timestep.float()).reshape(-1, 1, 1, 1))


class NoisyTime(Net):
    """Noise that never meets the state before it is folded."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float()
        y: Tensor = self.conv(x) + (time + torch.randn_like(time)).reshape(-1, 1, 1, 1)
        return y


def program_of(net: nn.Module) -> SamplerProgram:
    return export_program(net, make_plan(SchedulerConfig(prediction_type="v_prediction"), 2), (1, 4, 4), 1)


RANDOM: dict[str, Body] = {
    "randn_like": lambda y: y + torch.randn_like(y),
    "randn": lambda y: y + torch.randn(1),
    "rand": lambda y: y * torch.rand(y.shape),
    "normal": lambda y: torch.normal(y, torch.ones_like(y)),
    "uniform_": lambda y: y + torch.empty_like(y).uniform_(),
    "exponential_": lambda y: y + torch.empty_like(y).exponential_(),
    "bernoulli": lambda y: torch.bernoulli(torch.sigmoid(y)),
    "multinomial": lambda y: y + torch.multinomial(torch.ones(4), 1),
    "scaled_dot_product_attention": lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5),
}
TRAINING: dict[str, Body] = {
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
    "feature_dropout": lambda y: F.dropout2d(y, 0.5, training=True),
    "alpha_dropout": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "batch_norm": lambda y: F.batch_norm(y, None, None, training=True),
    "rrelu": lambda y: F.rrelu(y, training=True),
}
HARMLESS: dict[str, Body] = {
    "dropout that is off": nn.Dropout(0.5),
    "batch norm in evaluation": nn.BatchNorm2d(1),
    "attention": lambda y: F.scaled_dot_product_attention(y, y, y),
    "rrelu in evaluation": F.rrelu,
    "instance norm": F.instance_norm,
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_network_that_draws_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"the network draws random numbers \({name}\); only noise inputs"):
        program_of(Net(RANDOM[name]).eval())


@pytest.mark.parametrize("name", TRAINING)
def test_a_network_in_training_mode_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"the network holds {name} in training mode; call .eval\(\)"):
        program_of(Net(TRAINING[name]).eval())


def test_a_module_left_in_training_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the network holds dropout in training mode; call .eval\(\)"):
        program_of(Net(nn.Dropout(0.5)).train())


def test_noise_in_the_time_path_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the network draws random numbers \(randn_like\)"):
        program_of(NoisyTime(lambda y: y).eval())


def test_a_network_of_one_batch_size_is_told_to_take_one() -> None:
    class OfTwo(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * timestep if x.shape[0] == 2 else x

    x = torch.zeros(2, 1, 4, 4)
    capture(OfTwo(), 5, x, {}, dynamic_batch=False)
    with pytest.raises(UsageError, match=r"^torch .* captures the network for one batch size only: .* --batch 1, or"):
        capture(OfTwo(), 5, x, {}, dynamic_batch=True)


def test_a_decoder_of_one_batch_size_is_told_to_take_one() -> None:
    class OfTwo(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return 2 * latents if latents.shape[0] == 2 else latents

    with pytest.raises(UsageError, match=r"captures the decoder for one batch size only: .* --batch 1, or"):
        export_decoder(cast("LatentDecoder", OfTwo()), (1, 4, 4), None)


def test_control_flow_is_refused() -> None:
    def branch(y: Tensor) -> Tensor:
        result: Tensor = torch.cond(y.sum() > 0, lambda a: a + 1, lambda a: a - 1, (y,))
        return result

    with pytest.raises(UsageError, match=r"the network holds control flow \(cond\)"):
        program_of(Net(branch).eval())


@pytest.mark.parametrize("name", HARMLESS)
def test_a_static_network_is_let_through(name: str) -> None:
    net = Net(HARMLESS[name]).eval()
    program, x = program_of(net), torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        expected = net(x, torch.tensor([500]))
        torch.testing.assert_close(program.runner()(x, 0), expected, rtol=0, atol=1e-6)
