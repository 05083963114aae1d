"""Frozen encoders: images in, feature vectors out, gradients pass through to the images."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmd_export.errors import UsageError, one_line
from mmd_finetune.encoder import Encoder
from mmd_finetune.encoders import encoder_forms, load_encoder

__all__ = ["Encoder", "encoder_forms", "load_encoder", "load_encoders", "require_fit"]

LOG = logging.getLogger(__name__)
APART = 1e-2  # of the norm of an image's features: rounding, TF32 included, stays below


def load_encoders(
    specs: Sequence[str], shape: tuple[int, int, int], device: torch.device, *, gradient: bool = True
) -> tuple[Encoder, ...]:
    """The encoders of ``specs`` on ``device``, each tried out on images of ``shape``; warnings are logged.

    Raises UsageError for what cannot be loaded or used, and for two that have one name.
    """
    encoders = tuple(load_encoder(spec).to(device) for spec in specs)
    require_names(encoders)
    for encoder in encoders:
        require_fit(encoder, shape, gradient=gradient)
    return encoders


def require_names(encoders: Sequence[Encoder]) -> None:
    """Raise UsageError if two encoders have one name, as two files of one name in two folders have."""
    for name, count in Counter(encoder.name for encoder in encoders).items():
        if count > 1:
            raise UsageError(f"{count} encoders are called {name}; name each once, or rename one of the files")


def require_fit(encoder: Encoder, shape: tuple[int, int, int], *, gradient: bool = True) -> None:
    """Raise UsageError unless the encoder takes images (C, H, W), each for itself; it is run on two of them.

    With ``gradient`` it must also let gradients through, as one of the loss has to. Its warnings are logged.
    """
    for warning in encoder.warnings:
        LOG.warning("encoder %s: %s", encoder.name, warning)
    if encoder.shape is not None and encoder.shape != shape:
        raise UsageError(
            f"encoder {encoder.name} takes images {encoder.shape}, the model makes {shape}; use --features pixels "
            "or an encoder of that size"
        )
    if encoder.channels is not None and shape[0] not in encoder.channels:
        known = " or ".join(map(str, encoder.channels))
        raise UsageError(f"encoder {encoder.name} takes {known} channels, the model makes {shape[0]}")
    _try_out(encoder, shape, gradient)


def _try_out(encoder: Encoder, shape: tuple[int, int, int], gradient: bool) -> None:
    """Two images through the network and back, once more, and one of them beside another."""
    where = f"encoder {encoder.name}: on 2 images {shape}"
    network = encoder.network
    sample = next(itertools.chain(network.parameters(), network.buffers()), torch.zeros(()))
    images = torch.linspace(-1.0, 1.0, 2 * math.prod(shape), device=sample.device).reshape(2, *shape)
    try:
        features, again, beside_another = _three_times(encoder, images.requires_grad_(gradient))
        _require_features(features, where)
        _require_steady(features, again, beside_another, where)
        if gradient and not features.requires_grad:
            raise UsageError(f"{where} no gradient comes back; an encoder of the loss must be differentiable")
        if gradient:
            weights = torch.linspace(1.0, 2.0, features.numel(), device=features.device).reshape(features.shape)
            (back,) = torch.autograd.grad((features * weights).sum(), images)
            if not bool(torch.isfinite(back).all()):
                raise UsageError(f"{where} the gradient holds NaN or infinity")
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        grey = shape[0] == 1 and encoder.channels is None
        colours = "make three equal channels of one, as ?range=-1..1 does, or " if grey else ""
        raise UsageError(f"{where} it fails ({one_line(error)}); {colours}state its size, as in ?size=224") from error


def _require_features(features: object, where: str) -> None:
    if not isinstance(features, Tensor):
        raise UsageError(f"{where} it gives {type(features).__name__}; a tensor (2, d) is expected")
    if features.dim() != 2 or len(features) != 2 or not features.is_floating_point():
        kind = str(features.dtype).removeprefix("torch.")
        raise UsageError(f"{where} it gives {tuple(features.shape)} {kind}; (2, d) float32 is expected")
    if not bool(torch.isfinite(features.detach()).all()):
        raise UsageError(f"{where} a feature is NaN or infinite; its weights or its preprocessing are wrong")


def _three_times(encoder: Encoder, images: Tensor) -> tuple[Any, Any, Any]:
    """The features of two images, the same again, and of the first beside another second; the generator is put back."""
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        torch.manual_seed(0)
        features = encoder(images)
        with torch.no_grad():
            return features, encoder(images), encoder(torch.cat([images[:1], 0.5 * images[1:].flip(3)]))


def _require_steady(features: Tensor, again: Tensor, beside_another: Tensor, where: str) -> None:
    """Raise UsageError unless the features of an image depend on that image alone, as every estimator takes it."""
    if (gap := _gap(features, again)) > APART:
        raise UsageError(
            f"{where} the features change by {gap:.1%} from one call to the next; an encoder must draw nothing at "
            "random: save it in eval mode"
        )
    if (gap := _gap(features[:1], beside_another[:1])) > APART:
        raise UsageError(
            f"{where} the features of the first change by {gap:.1%} with the second; an encoder must not mix the "
            "images of a batch: save it in eval mode"
        )


def _gap(features: Tensor, others: Tensor) -> float:
    """|f - g| / |f|."""
    one, other = features.detach().double(), others.detach().double()  # a script may track gradients always
    return float((one - other).norm() / one.norm().clamp_min(1e-12))
