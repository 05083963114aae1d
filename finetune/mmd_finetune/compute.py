"""How the network is run while it is tuned: memory format, bfloat16, compilation. Its weights stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 is float32 on NVIDIA GPUs too: no TF32, 10 bits of mantissa, which torch lets cuDNN use."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class InBfloat16(nn.Module):
    """``network`` under autocast: matrix products and convolutions in bfloat16, weights and the result in float32.

    Only the network's calls are inside; the sampler's state, the encoders and the statistic stay out.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *arguments: Any, **conditions: Any) -> Tensor:
        """The output of ``network``, in the type of ``x``."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            output: Tensor = self.network(x, *arguments, **conditions)
        return output.to(x.dtype)


class ChannelsLast(nn.Module):
    """``network`` on images whose channels lie together in memory, as most convolutions want them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, *arguments: Any, **conditions: Any) -> Tensor:
        """The output of ``network`` in the usual format: the encoders flatten it."""
        output: Tensor = self.network(x.contiguous(memory_format=torch.channels_last), *arguments, **conditions)
        return output.contiguous()


def tuning_form(
    network: nn.Module, *, autocast: str = "off", channels_last: bool = False, compiled: bool = False
) -> nn.Module:
    """A module that computes ``network`` with its very parameters, in the arithmetic that is asked for."""
    form = network
    if autocast == "bf16":
        form = InBfloat16(form)
    if channels_last:
        form = ChannelsLast(form)
    return cast(nn.Module, torch.compile(form, dynamic=False)) if compiled else form
