"""Memory that was freed goes back to the system: a build is several stages, and its peak is the largest of them."""

from __future__ import annotations

import ctypes
import gc
import sys

# Of weights; what a smaller model leaves is not worth looking through all objects, half a second beside torch.
WORTH = 32 * 2**20


def release_heap(weight_bytes: int) -> None:
    """Hand freed memory back, where the C library keeps it: glibc holds on to what a stage has freed below its top."""
    if weight_bytes < WORTH:
        return
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
