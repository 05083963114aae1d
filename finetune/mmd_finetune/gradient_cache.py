"""The gradient of a loss of the whole batch with the memory of a micro-batch; Gao et al. 2021, arXiv 2101.06983.

    dL/dtheta = sum_p (dL/dF_p) (dF_p/dtheta),   F_p the features of micro-batch p, L = L(F_1, ..., F_P)

First pass: all F_p without a graph. Then dL/dF. Second pass: each F_p again, with its graph, and back from dL/dF_p. It
is exact, for any L and any parameters behind the features. The last micro-batch keeps its graph from the first pass, so
one micro-batch is the plain single pass, and of P micro-batches P - 1 are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Features = dict[str, Tensor]
"""By encoder, (n, d)."""


def backward(
    parts: int,
    features_of: Callable[[int], Features],
    losses_of: Callable[[Features], dict[str, Tensor]],
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """The losses of the whole batch, detached; the gradient of their weighted sum is added to the leaves' ``grad``.

    Args:
        parts: how many micro-batches there are.
        features_of: the features of micro-batch p; called twice it must compute the same, so it may draw nothing anew.
        losses_of: scalars, by encoder, from the features of all micro-batches, concatenated.
        weights: of the losses.
    """
    with torch.no_grad():
        cached = [features_of(p) for p in range(parts - 1)]
    live = features_of(parts - 1)
    leaves = [{name: values.detach().requires_grad_(True) for name, values in each.items()} for each in (*cached, live)]
    losses = losses_of({name: torch.cat([each[name] for each in leaves]) for name in live})
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
    _back(live, leaves.pop())
    del live
    for p, leaf in enumerate(leaves):
        _back(features_of(p), leaf)
    return {name: loss.detach() for name, loss in losses.items()}


def _back(features: Features, leaves: Features) -> None:
    """From dL/dF, which ``leaves`` hold, to the parameters behind ``features``."""
    told = {name: leaves[name].grad for name in features if features[name].requires_grad}
    torch.autograd.backward([features[name] for name in told], list(told.values()))
