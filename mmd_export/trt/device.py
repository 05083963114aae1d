"""The first NVIDIA GPU of this machine, asked of its driver; nothing has to be installed for that. No torch."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Numbers of CUdevice_attribute, https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html
_MAJOR, _MINOR = 75, 76
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """A GPU. ``capability`` is its compute capability (8.9), ``cuda`` the newest CUDA its driver runs (13.0)."""

    name: str
    capability: str
    driver: str
    cuda: str


def find_device() -> Device | None:
    """The first GPU, or None where there is no driver or no GPU."""
    driver = _driver()
    if driver is None or driver.cuInit(0):
        return None
    count, handle, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), handle)
    major, minor = (_attribute(driver, number, handle) for number in (_MAJOR, _MINOR))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Device(name.value.decode(errors="replace"), f"{major}.{minor}", _driver_version() or f"CUDA {cuda}", cuda)


def _driver() -> Any:
    """The driver's library, or None."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _attribute(driver: Any, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value


def _driver_version() -> str | None:
    """The release of the kernel module, such as 580.65.06; Linux only."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
