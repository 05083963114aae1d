"""What people run instead of one graph on the same weights: diffusers' pipeline, torch.compile, one-step sessions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from mmd_export.checkpoint import Checkpoint
from mmd_export.denoiser import AtTimesteps, DiffusersUNet
from mmd_export.errors import NotAvailableError, one_line
from mmd_export.plan import StepPlan
from mmd_export.quiet_diffusers import import_diffusers
from mmd_export.reference import run_chain
from mmd_export.step_session import per_step_session
from mmd_export.unroll import UnrolledSampler

Inputs = Mapping[str, NDArray[Any]]
Sample = Callable[[], NDArray[Any]]
_PIPELINES = {"ddim": "DDIMPipeline", "ddpm": "DDPMPipeline"}
SEED = 0


def baseline(name: str, checkpoint: Checkpoint, plan: StepPlan, inputs: Inputs, threads: int = 0) -> tuple[Sample, str]:
    """One inference as a call that gives the sample, and what it runs in; ``threads`` 0 leaves torch's number."""
    if threads:
        torch.set_num_threads(threads)
    if name == "diffusers":
        return _pipeline(checkpoint, plan, len(inputs["noise"])), f"diffusers {import_diffusers().__version__}"
    if name == "torch-compile":
        return _compiled(checkpoint, plan, inputs), f"torch {torch.__version__}, torch.compile of the network"
    sample, given = per_step_session(checkpoint, plan, len(inputs["noise"]), threads), dict(inputs)
    return lambda: sample(given), "onnxruntime, one step a call"


def _pipeline(checkpoint: Checkpoint, plan: StepPlan, batch: int) -> Sample:
    """diffusers' own pipeline as a user calls it, pictures as numpy; it draws its noise itself, from a fixed seed."""
    name, denoiser = _PIPELINES.get(plan.solver), checkpoint.denoiser
    conditions = checkpoint.conditions
    if isinstance(denoiser, DiffusersUNet) and denoiser.channels is not None:
        raise NotAvailableError("--against diffusers: its pipelines take no learned variance; use --against torch")
    if isinstance(denoiser, DiffusersUNet) and denoiser.timestep_scale != 1.0:
        raise NotAvailableError("--against diffusers: its pipelines tell no rescaled timestep; use --against torch")
    if name is None or conditions or not isinstance(denoiser, DiffusersUNet):
        raise NotAvailableError(
            f"--against diffusers: its pipelines for plain UNets are {', '.join(_PIPELINES)}; this bundle runs "
            f"{plan.solver} on {type(denoiser).__name__} with {len(conditions)} conditions; use "
            "--against torch"
        )
    diffusers = import_diffusers()
    pipeline = getattr(diffusers, name)(unet=denoiser.unet.eval(), scheduler=_scheduler(diffusers, name, checkpoint))
    pipeline.set_progress_bar_config(disable=True)

    def call() -> NDArray[Any]:
        generator = torch.Generator().manual_seed(SEED)
        images: NDArray[Any] = pipeline(
            batch_size=batch, generator=generator, num_inference_steps=plan.step_count, output_type="np"
        ).images
        return images

    return call


def _scheduler(diffusers: Any, pipeline: str, checkpoint: Checkpoint) -> Any:
    """The pipeline's scheduler with the checkpoint's settings; its grid may be another where diffusers lacks it."""
    chosen = getattr(diffusers, pipeline.replace("Pipeline", "Scheduler"))
    known = inspect.signature(chosen.__init__).parameters
    of_class = checkpoint.scheduler.as_class(chosen.__name__)
    settings = {name: value for name, value in of_class.settings().items() if name in known}
    if settings.get("timestep_spacing") not in ("leading", "trailing", "linspace"):
        settings.pop("timestep_spacing", None)  # as many calls, which is what is timed
    return chosen(**settings)


def _compiled(checkpoint: Checkpoint, plan: StepPlan, inputs: Inputs) -> Sample:
    """The sampler with its network compiled, as ``pipeline.unet = torch.compile(pipeline.unet)`` does it for one size.

    torch would take a second batch size for one of many, and run uncompiled what comes after eight graphs, two a size
    (torch._dynamo.config.recompile_limit, 2.13).
    """
    torch.compiler.reset()
    compiled: Any = torch.compile(checkpoint.denoiser, dynamic=False)  # a module, which its type does not tell
    sampler = UnrolledSampler(AtTimesteps(compiled, plan.timesteps), plan, decoder=checkpoint.decoder).eval()
    given = dict(inputs)
    try:
        run_chain(sampler, given)
    except (RuntimeError, OSError) as error:  # no compiler here, or a network that it does not take
        raise NotAvailableError(f"--against torch-compile: torch.compile fails here: {one_line(error)}") from error
    return lambda: run_chain(sampler, given)["sample"]
