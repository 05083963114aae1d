"""Weights of the encoders in the loss, so that none rules by the scale of its MMD^2.

    loss = sum_e w_e MMD^2_e,    w_e = (1 / E) mean(s) / s_e,    s_e = max(MMD^2_e(untuned model), sigma_e)

MMD^2 has the unit of its kernel: a cubic kernel on 2048 Inception features and a Gaussian one on pixels differ by
powers of ten, and their plain mean is the larger of them. Divided by what the untuned model has, every term starts at
the same height and tells which part of its gap is left. Where the untuned model is already as good as real images, that
gap is noise, and dividing by it would let the noise rule; so s_e is never below sigma_e, the standard deviation of the
MMD^2 of a batch of n real images. mean(s) keeps the loss at the height of the plain mean, a single encoder at weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.kernels import Kernel, subsample
from mmd_finetune.mmd import mean_of_pairs, unbiased_mmd2
from mmd_finetune.reference import Reference, encode_in_batches
from mmd_finetune.settings import ENCODED_AT_ONCE

BATCHES = 4  # of the untuned model, at most


def balanced_weights(
    references: Sequence[Reference], images: Tensor, batch: int, at_once: int = ENCODED_AT_ONCE
) -> dict[str, float]:
    """w_e by encoder, from images (N, C, H, W) of the untuned model, of which encoders take ``at_once`` at once.

    Raises UsageError if the untuned model's MMD^2 is not finite.
    """
    levels = {}
    for reference in references:
        real = subsample(reference.features)
        untuned = untuned_level(reference, real, images, batch, at_once)
        if not math.isfinite(untuned):
            raise UsageError(
                f"encoder {reference.encoder.name}: the MMD^2 of the untuned model is {untuned}; use another "
                "encoder or --kernel"
            )
        levels[reference.encoder.name] = max(untuned, real_level(reference.kernel, real, batch))
    return weights_of(levels)


def weights_of(levels: Mapping[str, float]) -> dict[str, float]:
    """w_e = mean(s) / (E s_e); equal ones where no level is above 0."""
    mean = sum(levels.values()) / len(levels)
    if not all(level > 0.0 for level in levels.values()):
        return dict.fromkeys(levels, 1.0 / len(levels))
    return {name: mean / (len(levels) * level) for name, level in levels.items()}


def equal_weights(references: Sequence[Reference]) -> dict[str, float]:
    """1 / E: the plain mean of the MMD^2."""
    return {reference.encoder.name: 1.0 / len(references) for reference in references}


def untuned_level(reference: Reference, real: Tensor, images: Tensor, batch: int, at_once: int) -> float:
    """The mean MMD^2 of the first few whole batches of ``images`` and the real features (m, d)."""
    parts = [part for part in images.split(min(batch, len(images))) if len(part) >= min(batch, len(images))][:BATCHES]
    kernel, mean = reference.kernel, mean_of_pairs(reference.kernel, real)
    with torch.no_grad():
        features = (encode_in_batches(reference.encoder, part, at_once).double() for part in parts)
        values = [unbiased_mmd2(kernel, each, real, mean) for each in features]
    return float(torch.stack(values).mean())


def real_level(kernel: Kernel, real: Tensor, batch: int) -> float:
    """sigma = (2 / (n (n - 1)) E[h(y, y')^2])^(1/2), h the centred kernel; Serfling 1980, 5.2.1.

    The standard deviation of the unbiased MMD^2 between n images and the whole distribution that they come from, which
    is a degenerate U-statistic of h (Gretton et al. 2012, section 4).
    """
    values = kernel(real, real)
    centred = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
    count = len(real)
    square = (centred.square().sum() - centred.diagonal().square().sum()) / (count * (count - 1))
    return math.sqrt(2.0 * float(square) / (batch * (batch - 1)))
