"""What one iteration computes: the MMD^2 of the global batch by encoder, and its gradient in the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmd_export.unroll import UnrolledSampler
from mmd_finetune.gradient_cache import Features, backward
from mmd_finetune.reference import Reference
from mmd_finetune.task import Task


def encoder_losses(
    references: Sequence[Reference], features: Mapping[str, Tensor], task: Task, iteration: int
) -> dict[str, Tensor]:
    """MMD^2 by encoder of the generated ``features``, of all processes, and the real images."""
    rows = task.real_rows(iteration)
    return {each.encoder.name: each.mmd2(features[each.encoder.name], rows, task.world) for each in references}


def add_gradient(
    task: Task, sampler: UnrolledSampler, noise: Mapping[str, Tensor], iteration: int, only: str | None = None
) -> dict[str, Tensor]:
    """The MMD^2 by encoder; the gradient of their weighted sum is added to every parameter behind ``sampler``.

    With several processes it is the part that goes through this process's images; the sum is the gradient.

    Args:
        task: references, loss weights, micro-batch.
        sampler: what is tuned.
        noise: this process's share of the batch, in the memory of the host: ``Task.noise_of``.
        iteration: chooses the real images and seeds whatever draws from torch's own generator.
        only: the name of one encoder, to see what it alone does.
    """
    references = [each for each in task.references if only in (None, each.encoder.name)]
    parts = list(split_inputs(noise, task.settings.micro_batch_size))

    def features_of(p: int) -> Features:
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
