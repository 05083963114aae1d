"""Which device torch computes on, by the name that the user gives."""

from __future__ import annotations

import re

import torch

from mmd_export.errors import NotAvailableError, UsageError


def torch_device(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:NUMBER``; ``auto`` and None take CUDA where there is one.

    Raises UsageError for another name, NotAvailableError for CUDA where torch sees none.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert name is not None
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device is {name!r}; give auto, cpu or cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise NotAvailableError(f"device {name}: no NVIDIA GPU is visible to torch; use --device cpu")
    return torch.device(name)
