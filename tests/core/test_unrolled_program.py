"""The whole sampler as one torch program: equal to the UnrolledSampler, weights once, inputs by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.program import export_program
from mmd_export.reference import run_chain, sampler_of, to_uint8
from mmd_export.unrolled_program import unroll

STEPS = 3


@pytest.fixture(scope="module")
def conditional(tiny_labels: Path) -> Checkpoint:
    return load_checkpoint(tiny_labels)


def tensors(checkpoint: Checkpoint, rows: int, noises: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    found = {"noise": torch.randn(rows, *checkpoint.shape, generator=draw)}
    if noises:
        found["step_noise"] = torch.randn(noises, rows, *checkpoint.shape, generator=draw)
    for condition in checkpoint.conditions:
        found[condition.name] = torch.from_numpy(condition.examples(3, rows))
    return found


@pytest.mark.parametrize(("sampler", "batch"), [("ddpm", None), ("dpmsolver", 2)])
def test_it_is_the_sampler(conditional: Checkpoint, sampler: str, batch: int | None) -> None:
    checkpoint = conditional
    plan = checkpoint.plan_for(STEPS, sampler=sampler)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, batch, checkpoint.conditions)
    captured = unroll(program, states=True)
    for rows in (2,) if batch else (2, 3):
        inputs = tensors(checkpoint, rows, plan.noisy_steps)
        expected = run_chain(sampler_of(checkpoint, plan), {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            sample, *states = captured.module(check_guards=False)(*inputs.values())
        torch.testing.assert_close(sample.numpy(), expected["sample"], rtol=0, atol=1e-5)
        for k, state in enumerate(states, start=1):
            torch.testing.assert_close(state.numpy(), expected[f"state.{k}"], rtol=0, atol=1e-5)


def test_weights_are_there_once_and_inputs_have_their_names(conditional: Checkpoint) -> None:
    checkpoint = conditional
    sizes = []
    for steps in (1, STEPS):
        plan = checkpoint.plan_for(steps, sampler="ddpm")
        program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1, checkpoint.conditions)
        captured = unroll(program)
        names = [name for name in captured.graph_signature.user_inputs if isinstance(name, str)]
        assert names == ["noise", *(["step_noise"] if plan.noisy_steps else []), "class_labels"]
        sizes.append(len(captured.graph_signature.parameters))
    assert sizes[0] == sizes[1] > 0


def test_bytes_are_rounded_as_the_reference_does(conditional: Checkpoint) -> None:
    checkpoint = conditional
    plan = checkpoint.plan_for(2)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 2, checkpoint.conditions)
    inputs = tensors(checkpoint, 2, plan.noisy_steps)
    with torch.no_grad():
        image = unroll(program).module(check_guards=False)(*inputs.values())
        levels = unroll(program, "uint8").module(check_guards=False)(*inputs.values())
    assert levels.dtype == torch.uint8
    torch.testing.assert_close(levels.numpy(), to_uint8(image.numpy()), rtol=0, atol=0)
