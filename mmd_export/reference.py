"""The float64 reference of a plan and a checkpoint: what the golden file holds and every stage is held against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmd_export.bundle import take
from mmd_export.checkpoint import Checkpoint
from mmd_export.denoiser import AtTimesteps, timestep_tensor
from mmd_export.errors import UsageError
from mmd_export.noise import sampler_noise
from mmd_export.plan import StepPlan
from mmd_export.unroll import UnrolledSampler

GOLDEN_SEED = 20230107
VALUES_AT_ONCE = 4096  # of noise; a convolution in float64 unfolds its input, 72 bytes a value, of all images at once


def sampler_of(checkpoint: Checkpoint, plan: StepPlan) -> UnrolledSampler:
    """The sampler that is tuned and shipped, time path not yet folded."""
    network = AtTimesteps(checkpoint.denoiser, plan.timesteps)
    return UnrolledSampler(network, plan, decoder=checkpoint.decoder).eval()


def golden_inputs(
    checkpoint: Checkpoint, plan: StepPlan, count: int, seed: int = GOLDEN_SEED
) -> dict[str, NDArray[Any]]:
    """The inputs of the golden file: noise from a fixed seed, and examples of every condition."""
    inputs: dict[str, NDArray[Any]] = dict(sampler_noise(seed, count, checkpoint.shape, plan.noisy_steps))
    told = {each.name: each.examples(seed + i, count) for i, each in enumerate(checkpoint.conditions, start=1)}
    return inputs | told


def run_chain(
    sampler: UnrolledSampler, inputs: dict[str, NDArray[Any]], dtype: torch.dtype = torch.float32
) -> dict[str, NDArray[Any]]:
    """``state.1`` ... ``state.K`` and ``sample`` of a sampler, as numpy arrays of ``dtype``."""
    tensors = {
        name: torch.from_numpy(array) if array.dtype == np.int64 else torch.from_numpy(array).to(dtype)
        for name, array in inputs.items()
    }
    with torch.inference_mode():
        states = list(sampler.chain(**tensors))
        results = {f"state.{k}": state.numpy() for k, state in enumerate(states, start=1)}
        return results | {"sample": sampler.finish(states[-1]).numpy()}


def run_in_parts(
    sampler: UnrolledSampler, inputs: dict[str, NDArray[Any]], size: int, dtype: torch.dtype = torch.float32
) -> dict[str, NDArray[Any]]:
    """``run_chain`` of ``size`` images at a time."""
    rows = [slice(start, start + size) for start in range(0, len(inputs["noise"]), size)]
    parts = [
        run_chain(sampler, {name: take(name, array, some) for name, array in inputs.items()}, dtype) for some in rows
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def golden_arrays(
    checkpoint: Checkpoint, plan: StepPlan, count: int, output: str = "float32", seed: int = GOLDEN_SEED
) -> dict[str, NDArray[Any]]:
    """Inputs, states and sample from the float64 reference, rounded to what the graph takes and gives.

    Raises UsageError for a model whose own states are NaN, infinite or beyond float32.
    """
    inputs = golden_inputs(checkpoint, plan, count, seed)
    size = max(1, VALUES_AT_ONCE // math.prod(checkpoint.shape))
    with checkpoint.doubled() as double:
        exact = run_in_parts(sampler_of(double, plan), inputs, size, torch.float64)
    with np.errstate(over="ignore"):
        golden = inputs | {name: array.astype(np.float32) for name, array in exact.items()}
    if wrong := [name for name in exact if not np.isfinite(golden[name]).all()]:
        raise UsageError(
            f"model {checkpoint.name}: its float64 reference gives NaN, infinity or more than float32 holds in "
            f"{wrong[0]}, of {plan.step_count} steps; check its weights or choose another sampler"
        )
    return golden | {"sample": to_uint8(exact["sample"])} if output == "uint8" else golden


def takes(checkpoint: Checkpoint, timestep: float) -> bool:
    """Whether its network runs at ``timestep``."""
    told = {each.name: torch.from_numpy(each.examples(0, 1)) for each in checkpoint.conditions}
    try:
        with torch.inference_mode():
            checkpoint.denoiser(torch.zeros(1, *checkpoint.shape), timestep_tensor(timestep), **told)
    except (IndexError, RuntimeError):
        return False
    return True


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1] to (N, H, W, C): round((x / 2 + 0.5) * 255), as diffusers' image processor."""
    levels: NDArray[np.uint8] = np.rint((image * 0.5 + 0.5) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
