"""Which device torch computes on, by the name that the user gives."""

from __future__ import annotations

import re

import torch

from mmd_export.errors import NotAvailableError, UsageError


def torch_device(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:NUMBER``; ``auto`` and None take CUDA where there is one.

    Raises UsageError for another name, NotAvailableError for CUDA where torch sees none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "auto"):
        return torch.device("cuda" if count else "cpu")
    assert name is not None
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device is {name!r}; give auto, cpu, cuda or cuda:NUMBER")
    device = torch.device(name)
    if device.type == "cuda" and not count:
        raise NotAvailableError(f"device {name}: no NVIDIA GPU is visible to torch; use --device cpu")
    if (device.index or 0) >= max(count, 1):
        raise NotAvailableError(f"device {name}: torch sees {count} GPUs, cuda:0 to cuda:{count - 1}; give one of them")
    return device
