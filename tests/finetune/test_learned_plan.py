"""The learned plan: it starts as the solver's table, its gradient is right, and what is learned is what ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.commands.inspect import inspect
from mmd_export.commands.verify import verify
from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan, is_learned
from mmd_export.plan_options import PlanOptions
from mmd_export.plans import choose_plan
from mmd_export.reference import sampler_of
from mmd_export.schedule import SchedulerConfig
from mmd_finetune.features import load_encoder
from mmd_finetune.learned_plan import LearnedSampler, PlanNumbers
from mmd_finetune.loop import tune
from mmd_finetune.metrics import sampler_inputs
from mmd_finetune.reference import encode_in_batches, make_reference
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.state import TuningState
from mmd_finetune.task import prepare
from mmd_finetune.trainable import Trainable, require_continuous_time

CONFIG = SchedulerConfig(prediction_type="v_prediction")
SHAPE = (1, 4, 4)
SOLVERS: list[dict[str, Any]] = [
    {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"sampler": "dpmsolver"},
    {"sampler": "unipc"}, {"sampler": "euler"}, {"sampler": "heun"}, {"sampler": "pndm"}, {"sampler": "lcm"},
    {"sampler": "ddim", "spacing": "trailing"}, {"sampler": "euler-ancestral"},
]  # fmt: skip


class TinyNetwork(nn.Module):
    """Smooth in x and in the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, k: int, timestep: Tensor) -> Tensor:
        del k
        output: Tensor = self.outward(torch.tanh(self.inward(x) + timestep / 100.0))
        return output


def moved(numbers: PlanNumbers, size: float = 0.3) -> PlanNumbers:
    """The same plan away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in numbers.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return numbers


@pytest.mark.parametrize("options", SOLVERS, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_it_starts_exactly_as_the_solvers_table(options: dict[str, Any], steps: int) -> None:
    if options["sampler"] == "pndm" and steps < 5:
        steps += 4  # its Runge-Kutta start takes three steps of four calls
    plan = choose_plan(CONFIG, steps, **options)
    assert PlanNumbers(plan, 999).plan() is plan


@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_order_and_range_of_timesteps_and_signs_of_noise_are_kept(options: dict[str, Any]) -> None:
    plan = choose_plan(CONFIG, 4, **options)
    learned = moved(PlanNumbers(plan, 999), 2.0).plan()
    assert is_learned(learned)
    assert learned.timesteps != plan.timesteps
    assert all(0.0 <= timestep <= max(999.0, *plan.timesteps) for timestep in learned.timesteps)
    pairs = zip(plan.timesteps, plan.timesteps[1:], learned.timesteps, learned.timesteps[1:], strict=False)
    for before, after, now_before, now_after in pairs:
        assert (before > after, before == after) == (now_before > now_after, now_before == now_after)
    for old, new in zip(_noises(plan), _noises(learned), strict=True):
        assert new != old
        assert new >= 0.0


def _noises(plan: StepPlan) -> list[float]:
    return [term.weight for step in plan.steps for term in step.update if term.source == "noise"]


def test_the_table_says_that_it_was_learned_and_from_what() -> None:
    plan = choose_plan(CONFIG, 3)
    learned = moved(PlanNumbers(plan, 999)).plan()
    assert learned.solver == "learned-ddim"
    assert learned.settings["learned_from"] == "ddim"
    assert learned.settings["start_sha256"] == plan.digest()
    assert learned.digest() != plan.digest()
    assert StepPlan.from_dict(json.loads(json.dumps(learned.to_dict()))) == learned
    again = moved(PlanNumbers(learned, 999)).plan()  # learned on from a learned one
    assert (again.solver, again.settings["learned_from"]) == ("learned-ddim", "ddim")


def test_coefficients_alone_leave_the_timesteps() -> None:
    plan = choose_plan(CONFIG, 3)
    learned = moved(PlanNumbers(plan, 999, with_timesteps=False)).plan()
    assert learned.timesteps == plan.timesteps
    assert learned.steps != plan.steps


def test_noise_levels_below_zero_are_no_timesteps_to_learn() -> None:
    plan = choose_plan(CONFIG, 3)
    steps = tuple(replace(step, timestep=step.timestep - 500.0) for step in plan.steps)
    assert PlanNumbers(replace(plan, steps=steps), 999).times is None


@pytest.mark.parametrize("options", SOLVERS[:4], ids=str)
def test_gradcheck_of_the_plan_in_the_whole_objective(options: dict[str, Any]) -> None:
    plan = choose_plan(CONFIG, 2, **options)
    numbers = moved(PlanNumbers(plan, 999), 0.05)
    sampler = LearnedSampler(TinyNetwork().double(), numbers)
    real = torch.rand(12, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    pixels = load_encoder("pixels")
    reference = make_reference(pixels, "gaussian", encode_in_batches(pixels, real))
    inputs = sampler_inputs(3, 4, SHAPE, plan.noisy_steps, 0, torch.device("cpu"))
    small = {name: 0.2 * tensor.double() for name, tensor in inputs.items()}  # away from the clamps
    parameters = tuple(numbers.parameters())

    def objective(*_: Tensor) -> Tensor:
        return reference.mmd2(reference.encoder(sampler(**small)))

    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-7)
    gradients = torch.autograd.grad(objective(), parameters)
    assert all(float(gradient.abs().max()) > 0.0 for gradient in gradients)


def test_what_is_learned_computes_what_ships(tiny_model: Path) -> None:
    base = load_checkpoint(tiny_model)
    for options in ({}, {"eta": 1.0}, {"sampler": "dpmsolver"}):
        plan = base.plan_for(3, **options)
        numbers = moved(PlanNumbers(plan, 999), 0.1)
        trained = Trainable(base.denoiser, plan, numbers).sampler()
        inputs = sampler_inputs(0, 4, base.shape, plan.noisy_steps, 0, torch.device("cpu"))
        with torch.no_grad():
            assert torch.equal(trained(**inputs), sampler_of(base, numbers.plan())(**inputs))
            numbers.coefficients.add_(0.1)  # the sampler reads the numbers when it runs
            assert torch.equal(trained(**inputs), sampler_of(base, numbers.plan())(**inputs))


@pytest.fixture(scope="module")
def learned_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "learned"
    values = {"model": tiny_model, "steps": 2, "out": out, "batch_size": 8, "iterations": 4, "evaluate_every": 2}
    more = {"evaluate_count": 16, "device": "cpu", "learn": "plan", "plan_learning_rate": 2e-2, "eta": 1.0}
    tune(make_settings({**values, **more, "model": str(tiny_model), "learning_rate": 3e-3}))
    return out


def test_the_run_folder_holds_the_learned_plan(learned_run: Path, tiny_model: Path) -> None:
    tuned = load_checkpoint(learned_run)
    start = load_checkpoint(tiny_model).plan_for(2, eta=1.0)
    assert tuned.plan is not None
    assert is_learned(tuned.plan)
    assert tuned.plan.settings["start_sha256"] == start.digest()
    assert tuned.plan_for() == tuned.plan == tuned.plan_for(2)
    facts = inspect(str(learned_run), PlanOptions())
    assert facts["plan"]["solver"] == "learned-ddim"
    assert facts["plan_learned_from"] == "ddim"
    assert tuned.plan.digest() in (learned_run / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"), [({"steps": 3}, "--steps is 3"), ({"sampler": "ddim"}, "--sampler is ddim")]
)
def test_another_plan_than_the_learned_one_is_refused(options: dict[str, Any], said: str, learned_run: Path) -> None:
    with pytest.raises(UsageError, match=rf"its plan was learned \(learned-ddim with 2 steps.*{said}"):
        load_checkpoint(learned_run).plan_for(**options)


def test_it_builds_to_onnx_and_verifies(learned_run: Path, tmp_path: Path) -> None:
    bundle = build(BuildOptions(str(learned_run), "onnx", tmp_path / "bundle"))
    assert bundle.manifest.plan == load_checkpoint(learned_run).plan_for().to_dict()
    report = verify(bundle, None, str(learned_run))
    report.require()
    skipped = {rung.number: rung.skipped for rung in report.rungs}
    assert "learned" in str(skipped[1])
    assert "learned" in str(skipped[2])
    assert not any(skipped[number] for number in (3, 4, 5, 6))


def test_a_plan_that_never_got_better_is_the_solvers(tiny_settings: FinetuneSettings, tiny_model: Path) -> None:
    harm = {"learning_rate": 1.0, "ema_decay": 0.0, "iterations": 2, "learn": "plan", "plan_learning_rate": 1.0}
    result = tune(FinetuneSettings(**(tiny_settings.model_dump() | harm)))
    assert result.best_iteration == 0
    assert load_checkpoint(result.folder).plan == load_checkpoint(tiny_model).plan_for(2)


def test_the_average_covers_the_plan(tiny_settings: FinetuneSettings) -> None:
    settings = FinetuneSettings(**(tiny_settings.model_dump() | {"learn": "plan"}))
    state = TuningState(prepare(settings).trainable(), 1e-3)
    trained, average = state.denoiser, state.average
    assert isinstance(trained, Trainable)
    assert isinstance(average, Trainable)
    assert trained.numbers is not None
    assert average.numbers is not None
    with torch.no_grad():
        trained.numbers.coefficients.add_(1.0)
    state.update_average(0.9)
    torch.testing.assert_close(average.numbers.coefficients, torch.full_like(trained.numbers.coefficients, 0.1))


def test_the_plan_has_a_rate_of_its_own(tiny_settings: FinetuneSettings) -> None:
    values = {"learn": "plan", "learning_rate": 1e-3, "plan_learning_rate": 5e-2, "iterations": 2}
    settings = FinetuneSettings(**(tiny_settings.model_dump() | values | {"rate_decay": "constant"}))
    seen: list[TuningState] = []
    original = TuningState.update_average

    def watch(self: TuningState, decay: float) -> None:
        seen.append(self)
        original(self, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningState, "update_average", watch)
        tune(settings)
    assert [group["lr"] for group in seen[-1].optimiser.param_groups] == pytest.approx([1e-3, 5e-2])


class LookedUp(nn.Module):
    """A network with a table of whole timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = x + self.table(timestep)[:, :, None, None]
        return output


class Rounding(LookedUp):
    """One that rounds what it is told."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep.long())


@pytest.mark.parametrize("network", [LookedUp, Rounding])
def test_a_network_of_whole_timesteps_learns_coefficients_only(network: type[nn.Module], tiny_model: Path) -> None:
    base = load_checkpoint(tiny_model)
    whole: Checkpoint = replace(base, denoiser=network())
    with pytest.raises(UsageError, match=r"no timestep between whole ones .*; use --learn coefficients"):
        require_continuous_time(whole, base.plan_for(2))
    require_continuous_time(base, base.plan_for(2))


def test_a_step_without_any_clamp_or_noise_keeps_its_terms() -> None:
    plan = choose_plan(CONFIG, 2, sampler="dpmsolver")
    learned = moved(PlanNumbers(plan, 999)).plan()
    for old, new in zip(plan.steps, learned.steps, strict=True):
        assert [(term.source, term.index) for term in old.update] == [(t.source, t.index) for t in new.update]
        assert {type(term.weight) for term in new.update} == {float}
        assert (new.alpha, new.sigma, new.scale) == (old.alpha, old.sigma, old.scale)
