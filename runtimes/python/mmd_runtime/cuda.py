"""The few calls of the CUDA runtime that running an engine takes, through cuda-python; numpy on the host. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mmd_export.errors import MmdExportError, NotAvailableError
from mmd_export.runtime import Array, uninstalled

INSTALL = "pip install cuda-python"
MODULE = "cuda.bindings.runtime"
# Of cudaError, https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
_NO_MEMORY = 2
# InsufficientDriver, CallRequiresNewerDriver, SystemDriverMismatch, CompatNotSupported
_OLD_DRIVER = (35, 36, 803, 804)
_NO_DEVICE = 100


def installed() -> bool:
    """Whether cuda-python is there."""
    return not uninstalled([MODULE])


class Cuda:
    """``cuda.bindings.runtime``, or one that behaves as it does.

    Every failed call raises MmdExportError; NotAvailableError where the driver is too old or sees no GPU.
    """

    def __init__(self, runtime: Any = None) -> None:
        self.runtime = _imported() if runtime is None else runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """The first of what the function gives beside its error code."""
        values = self.values(name, *arguments)
        return values[0] if values else None

    def values(self, name: str, *arguments: Any) -> list[Any]:
        """All that the function gives beside its error code."""
        code, *values = getattr(self.runtime, name)(*arguments)
        if int(code):
            raise _failure(name, code)
        return list(values)

    def device_seconds(self, stream: Any, work: Callable[[], None]) -> float:
        """Seconds between two events round what ``work`` puts on the stream."""
        start, stop = self.call("cudaEventCreate"), self.call("cudaEventCreate")
        try:
            self.call("cudaEventRecord", start, stream)
            work()
            self.call("cudaEventRecord", stop, stream)
            self.call("cudaEventSynchronize", stop)
            return float(self.call("cudaEventElapsedTime", start, stop)) / 1e3
        finally:
            self.release([("cudaEventDestroy", start), ("cudaEventDestroy", stop)])

    def stream(self) -> Any:
        """A new stream."""
        return self.call("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the device."""
        return int(self.call("cudaMalloc", max(size, 1)))

    def to_device(self, address: int, array: Array, stream: Any) -> None:
        """Start copying a contiguous array to the device."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: Array, address: int, stream: Any) -> None:
        """Start copying from the device into a contiguous array."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def wait(self, stream: Any) -> None:
        """Until all work of the stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: Any, work: Any) -> Any:
        """The graph of what ``work`` puts on the stream, ready to launch; None where it cannot be captured."""
        self.call("cudaStreamBeginCapture", stream, self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        done = False
        try:
            done = work()
        finally:  # a stream that stays in capture mode takes no other work
            code, graph = self.runtime.cudaStreamEndCapture(stream)
        if int(code):
            return None
        try:
            return self.call("cudaGraphInstantiate", graph, 0) if done else None
        finally:
            self.call("cudaGraphDestroy", graph)

    def release(self, held: list[tuple[str, Any]]) -> None:
        """Give back what was made, newest first, by the calls that do it; nothing is left to do about a failure."""
        while held:
            name, handle = held.pop()
            getattr(self.runtime, name)(handle)


def _failure(name: str, code: Any) -> MmdExportError:
    """What a failed call means, with the next move where there is one."""
    failed = f"{name} failed: {getattr(code, 'name', code)}"
    if int(code) in _OLD_DRIVER:
        return NotAvailableError(f"{failed}; the driver is too old for this cuda-python: update the driver")
    if int(code) == _NO_DEVICE:
        return NotAvailableError(f"{failed}; the driver sees no GPU; nvidia-smi lists what it sees")
    if int(code) == _NO_MEMORY:
        return NotAvailableError(f"{failed}; the GPU's memory is full: free some, or build with a smaller --batch")
    return MmdExportError(failed)


def _imported() -> Any:
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise NotAvailableError(f"cuda-python is not available here ({error}); {INSTALL}") from error
