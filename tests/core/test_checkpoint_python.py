"""``python:package.module:attribute``: any module loads and ships, gradients of energies too; the rest is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.checkpoints.gradient import GradientDenoiser
from mmd_export.errors import UsageError
from mmd_export.network_options import NetworkOptions
from mmd_export.program import export_program
from mmd_export.reference import run_chain, sampler_of
from tests import foreign_nets
from tests.older import needs

NETS = "python:tests.foreign_nets"
GRADIENTS = ("AutogradEnergy", "FunctionalEnergy", "LabelledEnergy")


@functools.cache
def traced(attribute: str) -> Checkpoint:
    """Loaded once for all tests that change nothing in it: a load traces the gradient twice."""
    needs("torch", "2.13", "a linear layer with a free batch cannot be traced")
    return load_checkpoint(f"{NETS}:{attribute}")


@functools.cache
def traced_in_double(attribute: str) -> Checkpoint:
    return traced(attribute).as_double()


def inputs(checkpoint: Checkpoint, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = torch.randn(batch, *checkpoint.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    labels = () if checkpoint.classes is None else (torch.arange(batch) % checkpoint.classes,)
    return x, torch.tensor([321]), *labels


# --- what loads


@pytest.mark.parametrize("attribute", ["Plain", "network", "make_plain"])
def test_a_class_an_instance_and_a_factory(attribute: str) -> None:
    checkpoint = load_checkpoint(f"{NETS}:{attribute}")
    assert (checkpoint.name, checkpoint.shape, checkpoint.classes) == (attribute, (1, 8, 8), None)
    assert checkpoint.scheduler.prediction_type == "v_prediction"
    assert (checkpoint.warnings, dict(checkpoint.configs), checkpoint.plan) == ((), {}, None)
    assert not any(module.training for module in checkpoint.denoiser.modules())
    assert {(p.dtype, p.requires_grad) for p in checkpoint.denoiser.parameters()} == {(torch.float32, False)}
    half = attribute == "make_plain"
    expected = foreign_nets.make_plain().float().eval() if half else foreign_nets.Plain()
    with torch.no_grad():
        assert torch.equal(checkpoint.denoiser(*inputs(checkpoint)), expected(*inputs(checkpoint)))


def test_labels_size_and_missing_scheduler() -> None:
    assert load_checkpoint(f"{NETS}:Labelled").classes == 4
    assert load_checkpoint(f"{NETS}:Plain", sample_size=(8, 16)).shape == (1, 8, 16)
    assert load_checkpoint(f"{NETS}:Plain?sample_size=12").shape == (1, 12, 12)
    (warning,) = load_checkpoint(f"{NETS}:Unscheduled").warnings
    assert "states no scheduler_config; taken as DDIMScheduler, linear betas" in warning


def test_a_module_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from tests.foreign_nets import Plain\n\nclass Own:\n    net = Plain()\n"
    (tmp_path / "nets_of_mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    first = load_checkpoint("python:nets_of_mine:Own.net")
    assert (first.name, first.folder) == ("net", tmp_path)
    assert first.sha256 != load_checkpoint(f"{NETS}:network").sha256  # another source, so maybe another function


def test_the_hash_follows_the_weights() -> None:
    first = load_checkpoint(f"{NETS}:network").sha256
    with torch.no_grad():
        foreign_nets.network.last.weight[0, 0, 0, 0] += 1
        try:
            assert load_checkpoint(f"{NETS}:network").sha256 != first
        finally:
            foreign_nets.network.last.weight[0, 0, 0, 0] -= 1


# --- latents and what else a network is told


def test_a_latent_that_is_told_a_text(tmp_path: Path) -> None:
    """Conditions go by name, labels by place; the state leaves the graph as it is, beyond 1 too."""
    checkpoint = load_checkpoint(f"{NETS}:Told")
    assert [(each.name, each.dtype, each.shape, each.below) for each in checkpoint.conditions] == [
        ("class_labels", "int64", (), 4),
        ("encoder_hidden_states", "float32", (3, 6), None),
        ("encoder_attention_mask", "int64", (3,), 2),
    ]
    assert (checkpoint.latent, checkpoint.warnings) == (True, ())
    bundle = build(BuildOptions(f"{NETS}:Told", "onnx", tmp_path / "b", steps=2))
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5
    assert bundle.manifest.plan["clamp_output"] is False
    golden = bundle.golden()
    np.testing.assert_array_equal(golden.sample, golden.states[-1])
    assert np.abs(golden.sample).max() > 1


def test_guidance_away_from_a_text() -> None:
    options = NetworkOptions(guidance_scale=2.0, null_label=0)
    names = [each.name for each in load_checkpoint(f"{NETS}:Told", network=options).conditions]
    assert names[3:] == ["negative_prompt_embeds", "negative_prompt_attention_mask"]


def test_a_gradient_that_is_told_a_text() -> None:
    checkpoint = load_checkpoint(f"{NETS}:ToldEnergy")
    assert isinstance(checkpoint.denoiser, GradientDenoiser)
    x, t = inputs(replace(checkpoint, conditions=()))
    told = {each.name: torch.from_numpy(each.examples(5, len(x))) for each in checkpoint.conditions}
    expected = foreign_nets.ToldEnergy()(x, t, **told).detach()
    with torch.inference_mode():
        assert torch.allclose(checkpoint.denoiser(x, t, **told), expected, atol=1e-5)


def test_channels_that_are_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(foreign_nets.Told, "latent")
    (warning,) = load_checkpoint(f"{NETS}:Told").warnings
    assert "has 4 channels: taken for pixels in [-1, 1] and clamped; or say latent = True" in warning


# --- gradients of energies


@pytest.mark.parametrize("attribute", GRADIENTS)
def test_a_gradient_is_the_gradient(attribute: str) -> None:
    """Traced once, it equals autograd: float32, float64, other batches, no_grad and inference mode."""
    checkpoint = traced(attribute)
    assert isinstance(checkpoint.denoiser, GradientDenoiser)
    module = getattr(foreign_nets, attribute)()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        denoiser = (checkpoint if dtype == torch.float32 else traced_in_double(attribute)).denoiser
        for batch in (1, 2, 5):
            given = inputs(checkpoint, batch, dtype)
            expected = module.to(dtype)(*given).detach()
            with torch.inference_mode():
                found = denoiser(*given)
            assert found.dtype == dtype
            assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(("version", "move"), [("2.12.1", "; torch 2.13 or newer may"), ("2.13.0", "")])
def test_a_gradient_that_torch_cannot_trace(version: str, move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no numel of symbolic sizes\nand more")

    monkeypatch.setattr("mmd_export.checkpoints.gradient.make_fx", refuse)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(UsageError) as error:
        load_checkpoint(f"{NETS}:AutogradEnergy")
    assert str(error.value).endswith(
        f"takes a gradient that torch {version} cannot trace: RuntimeError: no numel of symbolic sizes{move}"
    )


def test_a_gradient_by_finite_differences() -> None:
    """An exact answer: (E(x + h d) - E(x - h d)) / 2h = <grad E(x), d>."""
    checkpoint = traced_in_double("AutogradEnergy")
    energy = foreign_nets.Energy().double().requires_grad_(False).energy
    x, t = inputs(checkpoint, 2, torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    h = 1e-5
    expected = (energy(x + h * direction, t) - energy(x - h * direction, t)) / (2 * h)
    found = (checkpoint.denoiser(x, t) * direction).sum()
    assert float((found - expected).abs()) <= 1e-7 * float(expected.abs())


def test_tuning_goes_through_a_gradient() -> None:
    """The graph is differentiable in its weights and in its input, as the unrolled sampler needs."""
    denoiser = copy.deepcopy(traced("FunctionalEnergy").denoiser).requires_grad_(True)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    denoiser(x, torch.tensor([10])).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0
    untouched = [name for name, p in denoiser.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert untouched == ["network.last.weight", "network.last.bias"]  # no part of the energy


@pytest.mark.parametrize(
    ("attribute", "batch"), [("Plain", "2"), ("Labelled", "1..8"), *((name, "1..8") for name in GRADIENTS)]
)
def test_it_ships(attribute: str, batch: str, tmp_path: Path) -> None:
    """Checkpoint to verified ONNX bundle; every state of the artefact is near the float64 reference."""
    if attribute in GRADIENTS:
        traced(attribute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about autograd
        bundle = build(BuildOptions(f"{NETS}:{attribute}", "onnx", tmp_path / "b", steps=3, batch=batch))
    parity = bundle.manifest.parity
    assert parity is not None
    assert max(parity.values()) <= 1e-5


def test_a_fractional_timestep() -> None:
    """Grids of sigmas ask for timesteps that are no whole numbers."""
    checkpoint = traced("AutogradEnergy")
    x, _ = inputs(checkpoint)
    expected = foreign_nets.AutogradEnergy()(x, torch.tensor([20.5])).detach()
    assert torch.allclose(checkpoint.denoiser(x, torch.tensor([20.5])), expected, atol=1e-5)


def test_the_program_holds_no_autograd() -> None:
    checkpoint = traced("AutogradEnergy")
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, None)
    names = {str(node.target) for node in program.step.graph.nodes if node.op == "call_function"}
    assert not any("backward" in name or "grad" in name or "detach" in name for name in names), names
    states = run_chain(sampler_of(checkpoint, checkpoint.plan_for(2)), {"noise": np.zeros((1, 1, 8, 8), np.float32)})
    assert np.isfinite(states["sample"]).all()


# --- what is refused

REFUSED = {
    "Noisy": r"Noisy draws random numbers; only noise inputs may be random",
    "OwnNoise": r"OwnNoise draws noise or keeps state: two calls with the same input differ by",
    "Counting": r"Counting draws noise or keeps state: two calls with the same input differ by",
    "Branching": r"branches on data at foreign_nets.py:\d+ \(if x.sum\(\) > 0:\): .* torch.where",
    "TimeBranching": r"branches on data at foreign_nets.py:\d+ \(return x if int\(timestep\) > 500",
    "Selecting": r"branches on data at foreign_nets.py:\d+ \(return super\(\).forward\(x, timestep\) \* x\[x > 0\]",
    "NumpyNet": r"leaves torch at foreign_nets.py:\d+ \(.*x.numpy\(\)",
    "SingleOnly": r"float64|x.dtype",
    "MeanEnergy": r"mixes the samples of a batch: one sample alone differs by 1 of .* sum over the batch",
    "Leading": r"mixes the samples of a batch: one sample alone differs by",
    "Doubled": r"returns \(2, 2, 8, 8\) torch.float32 for x \(2, 1, 8, 8\)",
    "Tupled": r"returns tuple, not a tensor",
    "Failing": r"fails at foreign_nets.py:\d+ .* on .* of \(2, 1, 8, 8\) float32, \(1,\) int64",
    "Infinite": r"returns NaN or infinity",
    "Damaged": r"first.weight holds NaN or infinity",
    "Shapeless": r"sample_shape is None; \(channels, height, width\) is expected",
    "OddClasses": r"num_classes is 'ten'; a positive whole number",
    "EdmOfAnother": r"preconditioned is True, DDIMScheduler expects v_prediction; D\(x; sigma\) goes with EDMEuler",
    "OddLatent": r"latent is 'yes'; True or False",
    "OddCondition": r"conditions\['text'\] is \(3, 'wide'\); a shape without the batch",
    "TakenCondition": r"conditions names 'noise', which is taken",
    "UnusedCondition": r"fails on \(x, timestep, text\) of .*: TypeError",
    "OddScheduler": r"OddScheduler: scheduler: beta_schedule 'quadratic' is not supported",
    "Disagreeing": r"says prediction_type 'epsilon', the scheduler 'v_prediction'",
    "number": r"is int; an nn.Module or a function",
    "makes_a_number": r"makes int; an nn.Module is expected",
    "needs_arguments": r"calling it without arguments fails: TypeError",
    "absent": r"tests.foreign_nets has no absent; it has",
}  # fmt: skip


@pytest.mark.parametrize("attribute", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_at_once(attribute: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[attribute]) as error:
        load_checkpoint(f"{NETS}:{attribute}")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"model {NETS}:{attribute}")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("tests.foreign_nets", "package.module:attribute is expected"),
        (":Plain", "package.module:attribute is expected"),
        ("no_such_package.net:Net", "no_such_package.net cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_place_that_is_none(place: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_checkpoint(f"python:{place}")


def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_net.py").write_text("raise ValueError('no weights\\nhere')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"broken_net cannot be imported: ValueError: no weights$"):
        load_checkpoint("python:broken_net:Net")
