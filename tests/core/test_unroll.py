"""The unrolled sampler: exact on a plan made by hand, differentiable, and the same in ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmd_export.conditions import class_condition
from mmd_export.denoiser import AtTimesteps, timestep_tensor
from mmd_export.errors import UsageError
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.program import export_program
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.targets import CompileOptions, get_target
from mmd_export.unroll import UnrolledSampler, weighted_sum

SHAPE = (1, 2, 2)


class Line(nn.Module):
    """output = 2 x + timestep / 100 [+ label]: easy to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        y = self.weight * x + (timestep / 100).reshape(-1, 1, 1, 1)
        return y if class_labels is None else y + class_labels.reshape(-1, 1, 1, 1)


# State scaled at the start and before a call, clamped guesses, noise, and every kind of history in step 1.
HISTORY = StepPlan(
    solver="by hand",
    prediction_type="epsilon",
    steps=(
        Step(300.0, 0.5, 0.5, (Term("state", 0, 0.5), Term("output", 0, -0.25), Term("noise", 0, 2.0)), (1.0, -0.25)),
        Step(
            150.0,
            0.5,
            0.5,
            (
                Term("state", 0, 0.125),
                Term("output", 0, 3.0),
                Term("clean", 0, 10.0),
                Term("state", 1, -1.0),
                Term("output", 1, 0.5),
                Term("clean", 1, 100.0),
                Term("noise", 1, 1.0),
                Term("noise", 0, 1000.0),
            ),
            (0.0, 0.1),
            scale=4.0,
        ),
    ),
    clip=0.75,
    initial_scale=3.0,
    clamp_output=False,
)


def by_hand(noise: Any, step_noise: Any, label: float = 0.0) -> tuple[Any, Any]:
    """HISTORY over Line, in numpy and in the order of the plan's docstring."""
    s0 = 3.0 * noise
    o0 = 2.0 * s0 + 3.0 + label
    c0 = np.clip(s0 - 0.25 * o0, -0.75, 0.75)
    s1 = 0.5 * s0 - 0.25 * o0 + 2.0 * step_noise[0]
    o1 = 2.0 * 4.0 * s1 + 1.5 + label
    c1 = np.clip(0.1 * o1, -0.75, 0.75)
    s2 = 0.125 * s0 + 3.0 * o0 + 10.0 * c0 - s1 + 0.5 * o1 + 100.0 * c1 + step_noise[1] + 1000.0 * step_noise[0]
    return s1, s2


def arrays(batch: int = 2) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(batch, *SHAPE)), rng.normal(size=(2, batch, *SHAPE))


def test_history_is_the_hand_computed_result() -> None:
    noise, step_noise = arrays()
    sampler = UnrolledSampler(AtTimesteps(Line().double(), HISTORY.timesteps), HISTORY)
    with torch.no_grad():
        states = list(sampler.chain(torch.from_numpy(noise), torch.from_numpy(step_noise)))
        sample = sampler(torch.from_numpy(noise), torch.from_numpy(step_noise))
        clamped = UnrolledSampler(sampler.denoiser, replace(HISTORY, clamp_output=True))
        inside = clamped(torch.from_numpy(noise), torch.from_numpy(step_noise))
    guess = 3.0 * noise - 0.25 * (2.0 * 3.0 * noise + 3.0)
    assert 0 < (np.abs(guess) < 0.75).sum() < guess.size  # some guesses are clamped
    for state, expected in zip(states, by_hand(noise, step_noise), strict=True):
        np.testing.assert_allclose(state.numpy(), expected, rtol=1e-13)
    assert torch.equal(sample, states[-1])
    np.testing.assert_array_equal(inside.numpy(), np.clip(states[-1].numpy(), -1, 1))


def test_a_whole_timestep_is_int64_and_another_float32() -> None:
    assert timestep_tensor(300.0).dtype == torch.int64
    assert timestep_tensor(150.5).dtype == torch.float32
    assert timestep_tensor(150.5).item() == 150.5


@pytest.mark.parametrize("labels", [False, True])
def test_history_in_onnx(labels: bool, tmp_path: Path) -> None:
    program = export_program(Line().eval(), HISTORY, SHAPE, None, class_condition(7 if labels else None))
    get_target("onnx").compile(program, tmp_path, CompileOptions())
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    noise, step_noise = (array.astype(np.float32) for array in arrays(3))
    feeds = {"noise": noise, "step_noise": step_noise}
    if labels:
        feeds["class_labels"] = np.array([4, 4, 4])
    (found,) = session.run(["sample"], feeds)
    _, expected = by_hand(noise.astype(np.float64), step_noise.astype(np.float64), 4.0 if labels else 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)  # weights of 1000 in float32


def test_terms_are_added_in_their_order() -> None:
    """Float32 sums depend on it, and the artefact must round as the reference does."""
    known = {("state", 0): torch.tensor([1e8]), ("output", 0): torch.tensor([1.0])}
    terms = (Term("state", 0, 1.0), Term("output", 0, 1.0), Term("state", 0, -1.0))
    assert weighted_sum(terms, known).item() == 0.0
    assert weighted_sum((terms[0], terms[2], terms[1]), known).item() == 1.0


# --- step noise


@pytest.mark.parametrize("given", [None, 0, 1, 3])
def test_the_wrong_number_of_step_noises(given: int | None) -> None:
    sampler = UnrolledSampler(AtTimesteps(Line(), HISTORY.timesteps), HISTORY)
    step_noise = None if given is None else torch.zeros(given, 1, *SHAPE)
    with pytest.raises(UsageError, match=f"step_noise holds {given or 0} noises, the plan draws 2"):
        sampler(torch.zeros(1, *SHAPE), step_noise)


def test_step_noise_for_a_deterministic_plan() -> None:
    plan = make_plan(SchedulerConfig(), 2)
    with pytest.raises(UsageError, match="step_noise holds 1 noises, the plan draws 0"):
        UnrolledSampler(AtTimesteps(Line(), plan.timesteps), plan)(torch.zeros(1, *SHAPE), torch.zeros(1, 1, *SHAPE))


# --- gradients


class TinyNet(nn.Module):
    """Two convolutions that know the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.calls = 0

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.b(torch.tanh(self.a(x) + timestep.to(x.dtype) / 1000))
        return y


def stochastic(**settings: Any) -> StepPlan:
    data = {"_class_name": "DDIMScheduler", "prediction_type": "sample", "set_alpha_to_one": False, **settings}
    plan = make_plan(SchedulerConfig.from_dict(data), 3, spacing="trailing", eta=0.8)
    assert plan.noisy_steps == 3
    return plan


@pytest.mark.parametrize("clip_range", [0.2, 5.0])
def test_gradcheck_through_the_whole_chain(clip_range: float) -> None:
    plan, net = stochastic(clip_sample_range=clip_range), TinyNet().double()
    sampler = UnrolledSampler(AtTimesteps(net, plan.timesteps), plan)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator, requires_grad=True)
    step_noise = 0.1 * torch.randn(3, 1, *SHAPE, dtype=torch.float64, generator=generator)
    step_noise.requires_grad_(True)
    guesses: list[Tensor] = []
    net.register_forward_hook(lambda *call: guesses.append(call[2].detach()))
    parameters = tuple(net.parameters())

    def sample(noise: Tensor, step_noise: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in sampler.named_parameters()), weights, strict=True))
        result: Tensor = torch.func.functional_call(sampler, named, (noise, step_noise))
        return result

    with torch.no_grad():
        last = list(sampler.chain(noise, step_noise))[-1]
    inside = torch.stack(guesses).abs()
    near = (inside - clip_range).abs().min(), (last.abs() - 1).abs().min()
    assert min(float(gap) for gap in near) > 1e-4  # no clamp sits on its edge, where no derivative exists
    assert (clip_range == 5.0) == bool((inside < clip_range).all())
    assert torch.autograd.gradcheck(sample, (noise, step_noise, *parameters), eps=1e-6, atol=1e-6)


def test_every_parameter_and_noise_gets_a_gradient() -> None:
    plan, net = stochastic(clip_sample=False), TinyNet().double()
    sampler = UnrolledSampler(AtTimesteps(net, plan.timesteps), replace(plan, clamp_output=False))
    noise = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    step_noise = torch.randn(3, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    sampler(noise, step_noise).square().sum().backward()
    for tensor in (noise, *net.parameters()):
        assert tensor.grad is not None
        assert bool((tensor.grad != 0).any())
    assert step_noise.grad is not None
    assert all(bool((grad != 0).any()) for grad in step_noise.grad)


def test_checkpointed_calls_give_the_same_gradients() -> None:
    plan = stochastic()
    gradients, calls = [], []
    for checkpoint_calls in (False, True):
        net = TinyNet()
        sampler = UnrolledSampler(AtTimesteps(net, plan.timesteps), plan, checkpoint_calls=checkpoint_calls)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(2, *SHAPE, generator=generator)
        sampler(noise, torch.randn(3, 2, *SHAPE, generator=generator)).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        calls.append(net.calls)
        with torch.no_grad():
            sampler(noise, torch.zeros(3, 2, *SHAPE))
        assert net.calls == calls[-1] + 3  # without gradients nothing is computed twice
    assert calls == [3, 6]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


def test_nothing_inside_is_random() -> None:
    plan = stochastic()
    sampler = UnrolledSampler(AtTimesteps(TinyNet(), plan.timesteps), plan)
    noise, step_noise = torch.ones(1, *SHAPE), torch.ones(3, 1, *SHAPE)
    before = torch.get_rng_state()
    first, second = sampler(noise, step_noise), sampler(noise, step_noise)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
