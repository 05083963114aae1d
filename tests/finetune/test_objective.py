"""The gradient of the whole objective: encoder, MMD^2 and every network call of the chain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmd_export.checkpoint import load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.features import Encoder, load_encoder
from mmd_finetune.kernels import KERNELS
from mmd_finetune.metrics import sampler_inputs
from mmd_finetune.reference import Reference, ReferenceKind, encode_in_batches, make_reference

SHAPE = (1, 4, 4)


class TinyDenoiser(nn.Module):
    """A smooth network of 23 weights that depends on the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.outward = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        del class_labels
        output: Tensor = self.outward(torch.tanh(self.inward(x) + timestep / 1000.0))
        return output


def sampler_of(denoiser: nn.Module, *, eta: float = 0.0, checkpoint_calls: bool = False) -> UnrolledSampler:
    plan = make_plan(SchedulerConfig(prediction_type="v_prediction"), 2, eta=eta)
    return UnrolledSampler(AtTimesteps(denoiser, plan.timesteps), plan, checkpoint_calls=checkpoint_calls)


def loss_of(sampler: UnrolledSampler, reference: Reference, inputs: dict[str, Tensor]) -> Tensor:
    return reference.mmd2(reference.encoder(sampler(**inputs)))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize(
    ("eta", "kind", "biased"),
    [(0.0, "bank", False), (1.0, "bank", False), (0.0, "bank", True), (0.0, "nystrom", False)],
)
def test_gradcheck_of_the_whole_objective(kernel: str, eta: float, kind: ReferenceKind, biased: bool) -> None:
    real = torch.rand(12, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    encoder = Encoder("smooth", nn.Sequential(nn.Flatten(), nn.Tanh()))
    reference = make_reference(encoder, kernel, encode_in_batches(encoder, real), kind=kind, biased=biased, landmarks=5)
    denoiser = TinyDenoiser().double()
    sampler = sampler_of(denoiser, eta=eta)
    inputs = sampler_inputs(3, 4, SHAPE, sampler.plan.noisy_steps, 0, torch.device("cpu"))
    # Small noise keeps every pixel away from the clamps at -1 and 1, where no derivative exists.
    small = {name: 0.2 * tensor.double() for name, tensor in inputs.items()}

    def objective(*_: Tensor) -> Tensor:
        return loss_of(sampler, reference, small)

    assert torch.autograd.gradcheck(objective, tuple(denoiser.parameters()), eps=1e-6, atol=1e-7, fast_mode=True)


def of_pixels(real: torch.Tensor) -> Reference:
    pixels = load_encoder("pixels")
    return make_reference(pixels, "gaussian", encode_in_batches(pixels, real))


def test_both_calls_receive_gradient() -> None:
    # With one network per call the gradient must reach each of them.
    class TwoNets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([TinyDenoiser(), TinyDenoiser()])

        def forward(self, x: Tensor, k: int, class_labels: Tensor | None = None) -> Tensor:
            del class_labels
            output: Tensor = self.nets[k](x, torch.tensor([500.0]))
            return output

    nets = TwoNets()
    sampler = UnrolledSampler(nets, make_plan(SchedulerConfig(prediction_type="v_prediction"), 2))
    reference = of_pixels(torch.rand(20, *SHAPE))
    loss_of(sampler, reference, sampler_inputs(0, 4, SHAPE, 0, 0, torch.device("cpu"))).backward()
    for parameter in nets.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0.0


def test_recomputed_calls_give_equal_gradients(tiny_model: Path) -> None:
    base = load_checkpoint(tiny_model)
    plan = base.plan_for(2)
    reference = of_pixels(torch.rand(20, 1, 8, 8))
    inputs = sampler_inputs(0, 4, (1, 8, 8), 0, 0, torch.device("cpu"))
    gradients: list[list[Tensor]] = []
    for recompute in (False, True):
        denoiser = load_checkpoint(tiny_model).denoiser.requires_grad_(True)
        sampler = UnrolledSampler(AtTimesteps(denoiser, plan.timesteps), plan, checkpoint_calls=recompute)
        loss_of(sampler, reference, inputs).backward()
        gradients.append([p.grad for p in denoiser.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
