"""The usual deployment, as a baseline: one network call in onnxruntime, called K times, the sampler in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmd_export.chain import run_plan
from mmd_export.checkpoint import Checkpoint
from mmd_export.denoiser import timestep_tensor, typical_timestep
from mmd_export.folders import scratch_folder
from mmd_export.plan import StepPlan
from mmd_export.specialise import capture


def per_step_session(
    checkpoint: Checkpoint, plan: StepPlan, batch: int, threads: int = 0
) -> Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]:
    """A function inputs -> sample (B, C, H, W) that calls a static one-step graph K times, then a decoder's if any.

    The graph takes (x, timestep [, conditions]) as optimum-onnx exports it, with a static batch, which is faster.
    """
    example = typical_timestep(plan.timesteps)
    session = _one_step_session(checkpoint, example, batch, threads)
    decode = None if checkpoint.decoder is None else _decoder_session(checkpoint, batch, threads)
    timesteps = [np.array([timestep], dtype=timestep_tensor(example).numpy().dtype) for timestep in plan.timesteps]

    def sample(inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        conditions = {name: array for name, array in inputs.items() if name not in ("noise", "step_noise")}

        def network(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
            output: NDArray[np.float32] = session.run(None, {"x": x, "timestep": timesteps[k], **conditions})[0]
            return output

        *_, last = run_plan(plan, inputs, network)
        if decode is not None:
            image: NDArray[np.float32] = decode.run(None, {"latent": last})[0]
            return np.clip(image, -1.0, 1.0)
        return np.clip(last, -1.0, 1.0) if plan.clamp_output else last

    return sample


def _one_step_session(checkpoint: Checkpoint, timestep: float, batch: int, threads: int) -> Any:
    x = torch.zeros(batch, *checkpoint.shape)
    conditions = {each.name: torch.from_numpy(each.examples(0, batch)) for each in checkpoint.conditions}
    network = capture(checkpoint.denoiser, timestep, x, conditions, dynamic_batch=False)
    example = (x, timestep_tensor(timestep), *conditions.values())
    return _session(network, example, ["x", "timestep", *conditions], threads)


def _decoder_session(checkpoint: Checkpoint, batch: int, threads: int) -> Any:
    assert checkpoint.decoder is not None
    return _session(checkpoint.decoder, (torch.zeros(batch, *checkpoint.shape),), ["latent"], threads)


def _session(module: nn.Module, example: tuple[Tensor, ...], names: list[str], threads: int) -> Any:
    """``module`` exported by torch.onnx with its inputs called ``names``, loaded in onnxruntime."""
    import onnxruntime as ort

    from mmd_export.onnx_translate import OPSET, quiet_export

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    with scratch_folder() as folder, quiet_export():
        path = folder / "part.onnx"
        torch.onnx.export(
            module, example, path, dynamo=True, opset_version=OPSET, verbose=False, input_names=names,
            external_data=True,
        )  # fmt: skip
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
