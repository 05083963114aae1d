"""Which device torch computes on, by the name that the user gives; what the CPU of this machine has."""

from __future__ import annotations

import platform
import re
from typing import Any

import torch

from mmd_export.errors import NotAvailableError, UsageError

# What every CPU of a machine has, as compilers call it, and torch's words for one that has no more.
BASE_ISA = {"aarch64": "armv8-a", "x86_64": "x86-64"}
PLAIN = ("DEFAULT", "NO AVX")


def cpu_vectors() -> str:
    """The vectors that Inductor writes code for on this CPU, by torch's word for them; SVE by its own.

    On aarch64 Inductor looks for SVE and bfloat16 itself (torch 2.13, ``_inductor/cpu_vec_isa.py``) and takes SVE of
    128 bits too, for which torch's word is that of plain NEON.
    """
    word = torch.backends.cpu.get_cpu_capability()
    if platform.machine() != "aarch64":
        return word
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not has.get("bf16") or not (has.get("sve") or has.get("sve2")):
        return word
    bits = 128 if has.get("sve_max_length") == 128 else 256
    return f"SVE2-{bits}" if has.get("sve2") else f"SVE{bits}"


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


def use_threads(count: int) -> None:
    """Set torch's number of threads, 0 for its own choice, in the calling thread: OpenMP keeps one for each."""
    if count:
        torch.set_num_threads(count)
