"""What one iteration computes: the MMD^2 of the global batch by encoder, and its gradient in the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmd_export.errors import NotAvailableError
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.gradient_cache import Features, backward
from mmd_finetune.reference import Reference
from mmd_finetune.task import Task


def encoder_losses(
    references: Sequence[Reference], features: Mapping[str, Tensor], task: Task, iteration: int
) -> dict[str, Tensor]:
    """MMD^2 by encoder of the generated ``features``, of all processes, and the real images."""
    rows = task.real_rows(iteration) if task.settings.reference == "batch" else None
    return {each.encoder.name: each.mmd2(features[each.encoder.name], rows, task.world) for each in references}


def add_gradient(
    task: Task,
    sampler: UnrolledSampler,
    noise: Mapping[str, Tensor],
    iteration: int,
    *,
    only: str | None = None,
    give_way: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The MMD^2 by encoder; the gradient of their weighted sum is added to every parameter behind ``sampler``.

    With several processes it is the part that goes through this process's images; the sum is the gradient.

    Args:
        task: references, loss weights, micro-batch.
        sampler: what is tuned.
        noise: this process's share of the batch, in the memory of the host: ``Task.noise_of``.
        iteration: chooses the real images and seeds whatever draws from torch's own generator.
        only: the name of one encoder, to see what it alone does.
        give_way: called before every micro-batch; what it raises ends the work.
    """
    references = [each for each in task.references if only in (None, each.encoder.name)]
    parts = list(split_inputs(noise, task.settings.micro_batch_size))

    def features_of(p: int) -> Features:
        give_way()
        torch.manual_seed(task.generator_seed(iteration, p))  # the same in both passes and after a resume
        images = sampler(**{name: part.to(task.device, non_blocking=True) for name, part in parts[p].items()})
        return {each.encoder.name: each.encoder(images) for each in references}

    def losses_of(features: Features) -> dict[str, Tensor]:
        return encoder_losses(references, features, task, iteration)

    return backward(len(parts), features_of, losses_of, task.loss_weights)


def split_inputs(inputs: Mapping[str, Tensor], size: int | None) -> Iterator[dict[str, Tensor]]:
    """A sampler's inputs in micro-batches of at most ``size`` images; images are dimension 1 of ``step_noise``."""
    count = len(inputs["noise"])
    for start in range(0, count, size or count):
        stop = start + (size or count)
        yield {
            name: tensor[:, start:stop] if name == "step_noise" else tensor[start:stop]
            for name, tensor in inputs.items()
        }


def blamed(task: Task, sampler: UnrolledSampler, noise: Mapping[str, Tensor], iteration: int) -> list[str]:
    """The encoders whose MMD^2 alone has a gradient that is not finite; all of them if only the sum has.

    Only called once that has happened: it computes the iteration again for each encoder.
    """
    names = [each.encoder.name for each in task.references]
    found = []
    for name in names:
        sampler.zero_grad()
        add_gradient(task, sampler, noise, iteration, only=name)
        task.world.sum_gradients(sampler.parameters())
        if not all(bool(torch.isfinite(each.grad).all()) for each in sampler.parameters() if each.grad is not None):
            found.append(name)
    return found or names


def require_same_gradient(task: Task, denoiser: nn.Module, compiled: UnrolledSampler) -> None:
    """Raise NotAvailableError if compilation changes the gradient of ||sample||^2 in the weights of ``denoiser``.

    torch 2.13 does on x86: a compiled UNet2DModel of two levels gives the output of the eager one, and a gradient that
    is 0.27 of its norm off; of one level it is right. Rounding alone differs by about 1e-5, by 1e-2 in bfloat16.
    """
    eager = replace(task, settings=task.settings.model_copy(update={"compile": False})).tuning_sampler(denoiser)
    noise = next(split_inputs(task.noise_of(0), task.settings.micro_batch_size))
    noise = {name: tensor.to(task.device) for name, tensor in noise.items()}
    exact, found = (gradient_of_square(sampler, denoiser, noise) for sampler in (eager, compiled))
    difference, limit = float((found - exact).norm() / exact.norm()), 0.1 if task.settings.autocast != "off" else 0.01
    if not difference <= limit:
        raise NotAvailableError(
            f"--compile: torch {torch.__version__} compiles this network to a gradient that is off by {difference:.2g} "
            f"of its norm, {limit:g} is allowed; leave --compile out"
        )


def gradient_of_square(sampler: UnrolledSampler, denoiser: nn.Module, noise: Mapping[str, Tensor]) -> Tensor:
    """Gradient of ||sample||^2 in the parameters of ``denoiser``, flat, float64; none is left in them."""
    denoiser.zero_grad()
    sampler(**noise).square().sum().backward()
    found = torch.cat([each.grad.flatten().double() for each in denoiser.parameters() if each.grad is not None])
    denoiser.zero_grad()
    return found
