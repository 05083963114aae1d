"""Peak activation memory of captured calls: small modules whose answer can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from mmd_export.checkpoint import Checkpoint
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.program import export_program
from mmd_export.torch_compilers.facts import call_peak, kept_beside, peak_activation_bytes

VALUES = 10
BYTES = 4 * VALUES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VALUES))


def peak(module: nn.Module, given: int = 1, inputs: int = 1) -> int:
    with torch.no_grad():
        call = torch.export.export(module, tuple(torch.ones(1, VALUES) for _ in range(given)), strict=False)
    return call_peak(call, 1, inputs)


def test_the_inputs_stay_and_weights_are_free() -> None:
    class Chain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.relu(x) * self.weight).tanh()

    assert peak(Chain()) == 3 * BYTES  # x, relu, product


def test_what_is_computed_from_weights_alone_is_free() -> None:
    class Folded(Net):
        def forward(self, x: Tensor, constant: Tensor) -> Tensor:
            return x + torch.exp(self.weight * constant)

    assert peak(Folded(), given=2) == 2 * BYTES  # x, sum
    assert peak(Folded(), given=2, inputs=2) == 4 * BYTES  # x, constant; product, exponential


def test_an_operator_of_several_results_counts_them_all() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.split(x, VALUES // 2, dim=1)
            return left * right

    assert peak(Split()) == 2 * BYTES + BYTES // 2  # x; both halves; their product


@pytest.mark.parametrize("batch", [1, 3])
def test_a_free_size_is_the_multiple_of_the_batch_that_it_is(batch: int) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.cat([x, x]))

    with torch.no_grad():
        call = torch.export.export(
            Doubled(), (torch.ones(2, VALUES),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
        )
    assert call_peak(call, batch, 1) == 5 * batch * BYTES  # x; both; their tanh


def test_history_and_noise_are_held_beside_a_call() -> None:
    def step(*update: Term, scale: float = 1.0) -> Step:
        return Step(0.0, 1.0, 0.0, update, None, scale)

    steps = (
        step(Term("state", 0, 1.0), Term("output", 0, 1.0)),
        step(Term("state", 1, 1.0), Term("output", 1, 1.0), Term("output", 0, -1.0), Term("noise", 0, 0.1)),
        step(Term("state", 2, 1.0), Term("output", 2, 1.0), Term("noise", 1, 0.1), scale=0.5),
        step(Term("output", 3, 1.0), scale=0.5),
    )
    plan = StepPlan("euler", "epsilon", steps)
    assert [kept_beside(plan, k) for k in range(4)] == [2, 3, 3, 0]


def test_history_adds_to_the_largest_call(tiny_checkpoint: Checkpoint) -> None:
    """PNDM's Runge-Kutta start remembers up to six values, DDIM none."""
    peaks = []
    for sampler in ("ddim", "pndm"):
        plan = tiny_checkpoint.plan_for(8, sampler=sampler)
        peaks.append(peak_activation_bytes(export_program(tiny_checkpoint.denoiser, plan, tiny_checkpoint.shape, 1)))
    assert peaks[1] - peaks[0] == 6 * 4 * math.prod(tiny_checkpoint.shape)
