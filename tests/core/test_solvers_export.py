"""Multistep and two-call solvers through the whole chain: ONNX in onnxruntime, free-running and teacher-forced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.inspect import inspect, plan_rows, plot_plan
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import UsageError
from mmd_export.noise import sampler_noise
from mmd_export.parity import artefact_rung
from mmd_export.plan import StepPlan
from mmd_export.plan_options import PlanOptions
from mmd_export.plan_picture import weight_series
from mmd_export.program import export_program
from mmd_export.runtime import RunOptions
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.targets import CompileOptions, get_target
from mmd_export.unroll import UnrolledSampler
from mmd_runtime.registry import get_runtime

SAMPLERS = ("heun", "dpmsolver", "dpmsolver-sde")
STEPS = 3


OTHERS: dict[str, dict[str, Any]] = {
    "TCDScheduler": {},
    "DEISMultistepScheduler": {"solver_order": 3},
    "DPMSolverSinglestepScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "CMStochasticIterativeScheduler": {},
}


class Wave(nn.Module):
    """The smallest network: nonlinear, different at every timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(self.slope * x + torch.sin(timestep.to(x.dtype)).reshape(1, 1, 1, 1)) + 0.1 * x


@pytest.mark.parametrize("class_name", OTHERS)
def test_the_graph_is_the_unrolled_sampler(class_name: str, tmp_path: Path) -> None:
    config = SchedulerConfig.from_dict({"_class_name": class_name, **OTHERS[class_name]})
    plan = replace(make_plan(config, 4), clamp_output=False)
    network, shape = Wave().eval().requires_grad_(False), (1, 4, 4)
    get_target("onnx").compile(export_program(network, plan, shape, 2), tmp_path, CompileOptions())
    inputs = sampler_noise(5, 2, shape, plan.noisy_steps)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(inputs)
    (found,) = session.run(["sample"], inputs)
    sampler = UnrolledSampler(AtTimesteps(network, plan.timesteps), plan)
    expected = sampler(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1.0, float(np.abs(expected).max())))


@pytest.fixture(scope="module", params=SAMPLERS)
def bundle(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / request.param
    return build(BuildOptions(str(tiny), "onnx", out, steps=STEPS, sampler=request.param))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_every_state_free_running_and_teacher_forced(bundle: Bundle, runtime: str, tiny: Path) -> None:
    options = RunOptions(checkpoint=str(tiny)) if runtime == "torch" else RunOptions()
    adapter = get_runtime(runtime)
    rung = artefact_rung(bundle, adapter.open(bundle, options), adapter.open_chain(bundle, options))
    calls = StepPlan.from_dict(bundle.manifest.plan).step_count
    assert len(rung.comparisons) == 1 + 2 * calls
    assert rung.passed, rung.failures


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_forced_step_reads_the_states_that_it_is_given(bundle: Bundle, runtime: str, tiny: Path) -> None:
    """Older outputs are those of the given states, not of a free run."""
    options = RunOptions(checkpoint=str(tiny)) if runtime == "torch" else RunOptions()
    chain = get_runtime(runtime).open_chain(bundle, options)
    plan, golden = StepPlan.from_dict(bundle.manifest.plan), bundle.golden()
    rows = slice(0, bundle.manifest.batch.smallest)
    known: dict[str, Any] = {
        name: array[:, rows] if name == "step_noise" else array[rows] for name, array in golden.inputs.items()
    }
    known |= {f"state.{k}": golden.states[k - 1][rows] for k in range(1, plan.step_count)}
    for step in range(2, plan.step_count + 1):
        before = chain.run_step(step, known)
        read = {
            t.index for t in plan.steps[step - 1].update if t.source in ("state", "output", "clean") and t.index > 0
        }
        for k in range(1, step):
            changed = known | {f"state.{k}": np.ascontiguousarray(known[f"state.{k}"] + np.float32(0.5))}
            difference = float(np.abs(chain.run_step(step, changed) - before).max())
            assert (difference > 0.0) == (k in read), (step, k)


def test_inspect_shows_and_draws_the_plan(tiny: Path, tmp_path: Path) -> None:
    facts = inspect(str(tiny), PlanOptions(steps=STEPS, sampler="heun"))
    rows = plan_rows(StepPlan.from_dict(facts["plan"]))
    assert len(rows) == 2 * STEPS - 1
    assert "sees" in rows[0][1]
    assert "clean0" in rows[1][5]
    plot_plan(facts, tmp_path / "a" / "plan.png")
    plot_plan(facts, tmp_path / "again.png")
    data = (tmp_path / "a" / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == (tmp_path / "again.png").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["again.png"]


def test_no_plan_no_picture(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plan is known to draw; give --steps"):
        plot_plan(inspect(str(tiny), PlanOptions()), tmp_path / "plan.png")


def test_the_series_of_the_picture() -> None:
    plan = make_plan(SchedulerConfig(clip_sample=False), 3, sampler="dpmsolver")
    series = weight_series(plan)
    assert [k for k, _ in series["output", 1]] == [2]  # the first and the last step are of first order
    assert [k for k, _ in series["state", 0]] == [1, 2, 3]
