"""The prober: what it reads off a class that has no table, and what it refuses by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor

from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.plan import StepPlan, Term
from mmd_export.plans import choose_plan, plan_again
from mmd_export.probe import fresh_noises, largest_error, probe
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import CLASSES
from mmd_export.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROBED = sorted(name for name, solver in CLASSES.items() if solver not in SOLVERS)
FEW: dict[str, Any] = {"num_train_timesteps": 100}  # their constructor interpolates in Python at every one
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "KDPM2DiscreteScheduler": [{}, {"use_karras_sigmas": True, **FEW}, {"prediction_type": "v_prediction", **FEW}],
    "KDPM2AncestralDiscreteScheduler": [{}, {"timestep_spacing": "trailing", **FEW}],
    "LMSDiscreteScheduler": [{}, {"prediction_type": "sample"}],
    "IPNDMScheduler": [{}],
    "SASolverScheduler": [{}, {"prediction_type": "v_prediction"}, {"predictor_order": 3, "corrector_order": 4}],
    "SCMScheduler": [{}],
}


def config_of(class_name: str, **settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": class_name, **settings})


def test_every_class_without_a_table_is_tested() -> None:
    assert set(OPTIONS) == set(PROBED)


@pytest.mark.parametrize("class_name", PROBED)
def test_a_class_without_a_table(class_name: str) -> None:
    for settings in OPTIONS[class_name]:
        config = config_of(class_name, **settings)
        for steps in (1, 2, 5, 10):
            plan = choose_plan(config, steps)
            assert largest_error(plan, config, steps) <= 1e-12, (settings, steps)
            assert plan.settings["source"] == "probed"
            assert StepPlan.from_dict(plan.to_dict()) == plan
            assert plan_again(plan, config).digest() == plan.digest()


@pytest.mark.parametrize("class_name", PROBED)
def test_the_float32_scheduler_agrees(class_name: str) -> None:
    """Timesteps and scale of the unpatched class, in float32: what the prober patches changes digits only."""
    config = config_of(class_name)
    plan = probe(config, 2)
    scheduler = getattr(diffusers, class_name)()
    scheduler.set_timesteps(2)
    theirs = [float(t) for t in scheduler.timesteps][: plan.step_count]
    assert list(plan.timesteps) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert plan.initial_scale == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-5)


def test_kdpm2_by_hand() -> None:
    """The midpoint method in log sigma: x' = x + d (sigma_mid - sigma), then x + d_mid (sigma' - sigma)."""
    plan = probe(config_of("KDPM2DiscreteScheduler"), 2)
    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(2)
    sigma, middle, after = (float(scheduler.sigmas[0]), float(scheduler.sigmas_interpol[1]), float(scheduler.sigmas[1]))
    first, second = ({(t.source, t.index): t.weight for t in step.update} for step in plan.steps[:2])
    assert first == pytest.approx({("state", 0): 1.0, ("output", 0): middle - sigma}, rel=1e-5)
    assert second == pytest.approx({("state", 0): 1.0, ("output", 1): after - sigma}, rel=1e-5)


def test_the_numbers_of_calls_are_noted() -> None:
    settings = probe(config_of("KDPM2DiscreteScheduler"), 4).settings
    assert (settings["num_inference_steps"], settings["calls"]) == (4, 7)


def test_noises_that_never_count_are_left_out() -> None:
    plan = probe(config_of("EulerAncestralDiscreteScheduler"), 4)
    assert plan.noisy_steps == 3
    assert fresh_noises(plan) == [[0], [1], [2], []]


# --- schedulers made for a refusal


class Line:
    """x' = x - output / 2, the least that a scheduler is; subclasses break one rule each."""

    order = 1
    init_noise_sigma = 1.0
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.arange(num_train_timesteps)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps).flip(0)

    def scale_model_input(self, sample: Tensor, _t: Any) -> Tensor:
        return sample

    def step(self, output: Tensor, t: Any, sample: Tensor) -> Any:
        self.t = int(t)
        return SimpleNamespace(prev_sample=self.next(output, sample))

    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample - output / 2


class Branching(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample - output if sample.sum() > 0 else sample


class Adaptive(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample - output * float(output.norm())


class Thresholding(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        bound = torch.quantile(output.abs().flatten(), 0.9)
        return torch.clamp(sample - output, -bound, bound)


class BoundsFromData(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return torch.clamp(sample - output, -output.sum(), output.sum())


class Product(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample - output * sample


class Quotient(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return output / sample


class OneSidedClamp(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return (sample - output).clamp(0, 1)


class TwoClamps(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample.clamp(-1, 1) + output.clamp(-1, 1)


class ClampOfTheNextState(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        self.older = getattr(self, "older", 0.0) + sample - output
        return self.older.clamp(-1, 1)


class TwoRanges(Line):
    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return (sample - output).clamp(-1 - self.t, 1 + self.t)


class Bias(Line):
    """Affine, but no linear combination of what the plan knows."""

    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        return sample - output + 1.0


class Hidden(Line):
    """Leaves the watched class, so that only the second run finds it."""

    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        plain = output.detach().as_subclass(Tensor)
        return sample - torch.where(plain.abs() > 0.5, plain, torch.zeros_like(plain))


class Mixing(Line):
    def scale_model_input(self, sample: Tensor, _t: Any) -> Tensor:
        self.seen = getattr(self, "seen", 0.0) + sample
        return self.seen


class Refusing(Line):
    def set_timesteps(self, steps: int) -> None:
        raise ValueError(f"{steps} steps are too few\nsecond line")


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(chosen: type[Line]) -> SchedulerConfig:
        monkeypatch.setattr("mmd_export.diffusers_loop.scheduler_class", lambda _name: chosen)
        return config_of("IPNDMScheduler")

    return use


def test_the_line_itself_is_a_plan(scheduler: Any) -> None:
    plan = probe(scheduler(Line), 3)
    assert [step.update for step in plan.steps] == [(Term("state", k, 1.0), Term("output", k, -0.5)) for k in range(3)]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Branching, "gt"),
        (Adaptive, "norm"),
        (Thresholding, "abs"),
        (BoundsFromData, "clamps to bounds that depend on the data (dynamic thresholding)"),
        (Product, "mul"),
        (Quotient, "div"),
        (OneSidedClamp, "clamps to 0 ... 1"),
        (TwoClamps, "clamps twice"),
        (ClampOfTheNextState, "no clean guess"),
        (TwoRanges, "clamps to -2 ... 2, an earlier one to 3.0"),
        (Bias, "call 0 adds a constant"),
        (Hidden, "random inputs"),
        (Mixing, "scale_model_input of call 1 mixes"),
    ],
)
def test_what_is_not_affine_is_refused_by_name(scheduler: Any, chosen: type[Line], words: str) -> None:
    with pytest.raises(UsageError) as error:
        probe(scheduler(chosen), 3)
    assert "IPNDMScheduler is not affine" in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_diffusers_refuses_is_one_line(scheduler: Any) -> None:
    with pytest.raises(UsageError, match=r"IPNDMScheduler: diffusers refuses it: 3 steps are too few$"):
        probe(scheduler(Refusing), 3)


def test_a_class_that_diffusers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", None)
    with pytest.raises(NotAvailableError, match=r"diffusers .* has no such class"):
        probe(config_of("LMSDiscreteScheduler"), 2)


def test_nothing_stays_patched() -> None:
    module = __import__("sys").modules[diffusers.EulerDiscreteScheduler.__module__]
    before = {name: value for name, value in vars(module).items() if name != "__warningregistry__"}
    probe(config_of("EulerDiscreteScheduler"), 2)
    assert {name: vars(module)[name] for name in before} == before
    assert torch.get_default_dtype() == torch.float32
    assert diffusers.EulerDiscreteScheduler().sigmas.dtype == torch.float32


def test_timesteps_that_the_class_cannot_take() -> None:
    with pytest.raises(UsageError, match="diffusers' LMSDiscreteScheduler takes none of its own"):
        choose_plan(config_of("LMSDiscreteScheduler"), None, timesteps=(900, 100))
    with pytest.raises(UsageError, match=r"--spacing mmd-ddm lists timesteps; .* LMSDiscreteScheduler takes none"):
        choose_plan(config_of("LMSDiscreteScheduler"), 5, spacing="mmd-ddm")
