"""Stand-ins for a GPU and an engine: a device whose memory is the host's, an engine that adds one and clamps."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from mmd_export.bundle import BatchSpec, Bundle, TensorSpec
from tests.export.bundles import draft, make


class Code(IntEnum):
    OK = 0
    NO_MEMORY = 2
    OLD_DRIVER = 35
    NO_DEVICE = 100
    OTHER = 700


class HostCuda:
    """Behaves as cuda.bindings.runtime; work on a stream is done at once, unless the stream is being captured."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.buffers: dict[int, Any] = {}
        self.capturing: list[Any] | None = None
        self.fail: str | None = None
        self.code = Code.NO_MEMORY
        self.events: list[int] = []

    def __getattr__(self, name: str) -> Any:
        kinds = {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaStreamCaptureModeThreadLocal": 1}
        if name in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
            return SimpleNamespace(**kinds)
        work: dict[str, Any] = {
            "cudaStreamCreate": lambda: 7,
            "cudaMalloc": self.allocate,
            "cudaFree": self.buffers.pop,
            "cudaMemcpyAsync": self.copy,
            "cudaStreamBeginCapture": self.begin,
            "cudaStreamEndCapture": self.end,
            "cudaGraphInstantiate": lambda graph, _: graph,
            "cudaGraphLaunch": lambda graph, _: [run() for run in graph],
            "cudaEventCreate": lambda: self.calls.count("cudaEventCreate"),
            "cudaEventRecord": lambda event, _: self.events.append(event),
            "cudaEventElapsedTime": lambda start, stop: 2.5 * (stop - start),
        }

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            result = work.get(name, lambda *_: None)(*arguments)
            return (self.code, None) if name == self.fail else (Code.OK, result)

        return call

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def copy(self, to: int, start: int, size: int, kind: int, stream: int) -> None:
        assert size <= len(self.buffers[to if kind == 1 else start])
        assert stream == 7
        assert self.capturing is None
        ctypes.memmove(to, start, size)

    def begin(self, *_: int) -> None:
        self.capturing = []

    def end(self, _: int) -> Any:
        work, self.capturing = self.capturing, None
        return work


class AddsOne:
    """An engine: sample = clip(noise + 1); one context a profile and shape."""

    def __init__(self, cuda: HostCuda, profiles: int = 1, names: tuple[str, ...] = ("noise", "sample")) -> None:
        self.cuda, self.num_optimization_profiles, self.names = cuda, profiles, names
        self.num_io_tensors = len(names)
        self.contexts: list[Any] = []

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def create_execution_context(self) -> Any:
        self.contexts.append(Context(self.cuda))
        return self.contexts[-1]


class Context:
    def __init__(self, cuda: HostCuda) -> None:
        self.cuda, self.profile, self.runs = cuda, 0, 0
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        self.profile = place
        return stream == 7

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "noise"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in self.cuda.buffers

    def execute_async_v3(self, stream: int) -> bool:
        if self.cuda.capturing is not None:
            self.cuda.capturing.append(self.compute)
        else:
            self.compute()
        return stream == 7

    def compute(self) -> None:
        self.runs += 1
        count = int(np.prod(self.shape))
        noise, sample = (self.view(name, count) for name in ("noise", "sample"))
        sample[:] = np.clip(noise + 1, -1, 1)

    def view(self, name: str, count: int) -> Any:
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))


def bundle_for(folder: Path, batch: str = "1", **changes: Any) -> Bundle:
    spec = BatchSpec.parse(batch)
    rows: int | Literal["batch"] = spec.smallest if spec.is_static else "batch"
    shape = (rows, 1, 2, 2)
    fields: dict[str, Any] = {
        "batch": spec,
        "inputs": (TensorSpec(name="noise", dtype="float32", shape=shape),),
        "outputs": (TensorSpec(name="sample", dtype="float32", shape=shape),),
    }
    return make(folder / "b", draft=draft(**fields, **changes))


def noise(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, 1, 2, 2)).astype(np.float32)


def expected(array: np.ndarray[Any, Any]) -> Any:
    return np.clip(array + 1, -1, 1, dtype=np.float32)
