"""EDM preconditioning as numbers of the plan: the same sampler as Karras et al. 2022 write it with D(x; sigma)."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import load_checkpoint
from mmd_export.denoiser import AtTimesteps, EdmDenoiser, EdmPreconditioning
from mmd_export.errors import UsageError
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers.edm import edm_sigmas
from mmd_export.unroll import UnrolledSampler
from tests import foreign_nets
from tests.models import save_model

SIGMAS = (80.0, 12.0, 1.5, 0.2, 0.0)
DATA = 0.5


class Raw(nn.Module):
    """F: nonlinear, different at every noise level."""

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shift = 0.0 if class_labels is None else 0.1 * class_labels.to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(0.7 * x + timestep.to(x.dtype).reshape(-1, 1, 1, 1).sin()) + shift


def noise() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def euler_loop(x: Tensor) -> Tensor:
    """Algorithm 1 without its second-order correction: x' = x + (sigma' - sigma) (x - D(x; sigma)) / sigma."""
    for sigma, after in pairwise(SIGMAS):
        total = sigma**2 + DATA**2
        raw = Raw()(x / total**0.5, torch.tensor([math.log(sigma) / 4], dtype=x.dtype))
        clean = DATA**2 / total * x + sigma * DATA / total**0.5 * raw
        x = x + (after - sigma) * (x - clean) / sigma
    return x


def euler_plan(*, inside: bool) -> StepPlan:
    """Euler as a table; ``inside``: the preconditioning is in the network, so its output is the clean image."""
    steps = []
    for k, (sigma, after) in enumerate(pairwise(SIGMAS)):
        level, ratio = EdmPreconditioning.at(sigma, DATA), after / sigma
        terms = [Term("state", k, ratio + (0.0 if inside else (1 - ratio) * level.c_skip))]
        terms += [Term("output", k, (1 - ratio) * (1.0 if inside else level.c_out))]
        scale, timestep = (1.0, sigma) if inside else (level.c_in, level.c_noise)
        steps.append(Step(timestep, 1.0, sigma, tuple(terms), scale=scale))
    return StepPlan("euler", "sample", tuple(steps), initial_scale=SIGMAS[0], clamp_output=False)


def test_the_numbers_fit_the_plan() -> None:
    """Scale c_in, timestep c_noise and the terms of c_skip and c_out: the raw network needs no adapter."""
    plan = euler_plan(inside=False)
    # AtTimesteps rounds a timestep to float32, as diffusers hands it over.
    found = UnrolledSampler(AtTimesteps(Raw(), plan.timesteps), plan)(noise())
    assert float((found - euler_loop(SIGMAS[0] * noise())).abs().max()) <= 1e-6


def test_the_adapter_is_d() -> None:
    plan = euler_plan(inside=True)
    found = UnrolledSampler(EdmDenoiser(Raw(), SIGMAS[:-1], DATA), plan)(noise())
    assert float((found - euler_loop(SIGMAS[0] * noise())).abs().max()) <= 1e-12


def test_labels_go_through() -> None:
    x, labels = noise(), torch.tensor([0, 3])
    denoiser = EdmDenoiser(Raw(), (2.0,), DATA)
    moved = denoiser(x, 0, class_labels=labels) - denoiser(x, 0, class_labels=torch.tensor([0, 0]))
    assert float(moved[0].abs().max()) == 0.0
    assert float((moved[1] - 0.3 * EdmPreconditioning.at(2.0).c_out).abs().max()) <= 1e-15


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_exact_properties(sigma: float) -> None:
    """Unit variance in (c_in) and out (c_out); D is the identity without noise."""
    level = EdmPreconditioning.at(sigma, DATA)
    assert level.c_in**2 * (sigma**2 + DATA**2) == pytest.approx(1.0)
    assert level.c_out**2 == pytest.approx((1 - level.c_skip) ** 2 * DATA**2 + level.c_skip**2 * sigma**2)
    assert EdmPreconditioning.at(1e-9, DATA).c_skip == pytest.approx(1.0)
    assert math.exp(4 * level.c_noise) == pytest.approx(sigma)


@pytest.mark.parametrize(("sigma", "data"), [(0.0, 0.5), (-1.0, 0.5), (math.inf, 0.5), (1.0, 0.0), (math.nan, 0.5)])
def test_levels_that_have_no_numbers(sigma: float, data: float) -> None:
    with pytest.raises(UsageError, match="both must be positive"):
        EdmPreconditioning.at(sigma, data)


NETS = "python:tests.foreign_nets"


def test_a_network_that_is_d_itself() -> None:
    """F recovered from D is the F inside it, at every noise level of a plan; the state has all digits that D has."""
    inner, outer = (load_checkpoint(f"{NETS}:{name}").as_double() for name in ("EdmRawNet", "EdmNet"))
    plan = outer.plan_for(4)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in plan.steps:
        timestep = torch.tensor([step.timestep], dtype=torch.float64)
        raw = inner.denoiser(x, timestep)
        assert float((outer.denoiser(x, timestep) - raw).abs().max()) <= 1e-11


def test_a_preconditioned_module_ships(tmp_path: Path) -> None:
    """Checkpoint to verified ONNX; the sample is that of Euler's loop in x and D."""
    bundle = build(BuildOptions(f"{NETS}:EdmNet", "onnx", tmp_path / "b", steps=3))
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5
    golden, network = bundle.golden(), foreign_nets.EdmNet().double()
    sigmas = [*edm_sigmas(SchedulerConfig.from_dict({"_class_name": "EDMEulerScheduler"}), 3), 0.0]
    x = torch.from_numpy(golden.noise).double() * math.sqrt(80.0**2 + 1)
    with torch.no_grad():
        for sigma, after in pairwise(sigmas):
            clean = network(x, torch.tensor([sigma], dtype=torch.float64))
            x = x + (after - sigma) * (x - clean) / sigma
    assert float((x.clamp(-1, 1) - torch.from_numpy(golden.sample)).abs().max()) <= 1e-6


def test_a_folder_with_an_edm_scheduler_ships(tmp_path: Path) -> None:
    """UNet2DModel as F."""
    settings = {"class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}
    save_model(tmp_path / "edm", settings, block_out_channels=(4,))
    bundle = build(BuildOptions(str(tmp_path / "edm"), "onnx", tmp_path / "b", steps=2))
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5
    assert bundle.manifest.plan["prediction_type"] == "edm"
