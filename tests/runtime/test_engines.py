"""The session of an engine, on stand-ins: a device whose memory is the host's, an engine that adds one and clamps.

No GPU is here, and nothing else can run an engine, so what is tested is our side of the two interfaces: addresses,
shapes, profiles, copies, captured graphs, and what is said where the other side refuses.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from mmd_export.bundle import BatchSpec, Bundle, TensorSpec
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError
from mmd_export.runtime import BindingSession, EventTimed, RunOptions, Session
from mmd_export.trt.device import Device
from mmd_export.trt.engine import onnx_sha256
from mmd_export.trt.library import RTX
from mmd_export.trt.lock import LockFacts
from mmd_runtime import engines
from mmd_runtime.cuda import Cuda
from mmd_runtime.engines import EngineRuntime, EngineSession, load_engine, profile_of
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


def test_a_static_batch_is_captured_when_it_is_opened(tmp_path: Path) -> None:
    cuda = HostCuda()
    engine = AddsOne(cuda)
    session = EngineSession(bundle_for(tmp_path), engine, Cuda(cuda))
    assert isinstance(session, Session)
    assert engine.contexts[0].runs == 1  # to warm up; the capture itself runs nothing
    assert cuda.calls.count("cudaStreamEndCapture") == 1
    for seed in (1, 2):
        np.testing.assert_array_equal(session.run({"noise": noise(1, seed)})["sample"], expected(noise(1, seed)))
    assert cuda.calls.count("cudaGraphLaunch") == 2
    assert cuda.calls.count("cudaMalloc") == 2


def test_a_session_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    cuda = HostCuda()
    session = EngineSession(bundle_for(tmp_path, "1,2"), AddsOne(cuda, profiles=2), Cuda(cuda))
    for count in (1, 2):
        session.run({"noise": noise(count)})
        assert session.is_captured(count)
    assert len(cuda.buffers) == 4
    del session
    gc.collect()
    assert not cuda.buffers
    for given_back in ("cudaFree", "cudaStreamDestroy", "cudaGraphExecDestroy"):
        assert cuda.calls.count(given_back) == (4 if given_back == "cudaFree" else 2)


def test_a_session_that_cannot_open_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    cuda = HostCuda()
    cuda.fail = "cudaGraphInstantiate"
    with pytest.raises(MmdExportError, match="cudaGraphInstantiate failed"):
        EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))
    gc.collect()
    assert not cuda.buffers
    assert cuda.calls.count("cudaGraphDestroy") == 1


def test_a_capture_that_fails_is_ended_and_said(tmp_path: Path) -> None:
    cuda = HostCuda()

    def fails() -> bool:
        raise MmdExportError("no")

    with pytest.raises(MmdExportError, match="no"):
        Cuda(cuda).capture(7, fails)
    assert cuda.calls == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]
    cuda.fail = "cudaStreamEndCapture"
    session = EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))
    assert not session.is_captured(1)
    np.testing.assert_array_equal(session.run({"noise": noise(1)})["sample"], expected(noise(1)))


def test_results_are_not_overwritten_by_the_next_run(tmp_path: Path) -> None:
    session = EngineSession(bundle_for(tmp_path), AddsOne(cuda := HostCuda()), Cuda(cuda))
    first = session.run({"noise": noise(1, 1)})["sample"]
    session.run({"noise": noise(1, 2)})
    np.testing.assert_array_equal(first, expected(noise(1, 1)))


def test_a_list_of_batches_has_a_profile_each(tmp_path: Path) -> None:
    cuda = HostCuda()
    engine = AddsOne(cuda, profiles=3)
    bundle = bundle_for(tmp_path, "1,2,3")
    session = EngineSession(bundle, engine, Cuda(cuda))
    assert [context.profile for context in engine.contexts] == [0, 1, 2]
    for count in (3, 1, 3):
        np.testing.assert_array_equal(session.run({"noise": noise(count)})["sample"], expected(noise(count)))
    assert [context.shape[0] for context in engine.contexts] == [1, 2, 3]
    assert cuda.calls.count("cudaStreamEndCapture") == 3
    assert profile_of(bundle, 2) == 1
    with pytest.raises(UsageError, match="batch 4 has no profile; built for 1,2,3"):
        profile_of(bundle, 4)


def test_a_range_of_batches_is_not_captured(tmp_path: Path) -> None:
    cuda = HostCuda()
    session = EngineSession(bundle_for(tmp_path, "1..3"), AddsOne(cuda), Cuda(cuda))
    for count in (1, 2, 3):
        np.testing.assert_array_equal(session.run({"noise": noise(count)})["sample"], expected(noise(count)))
    assert "cudaStreamBeginCapture" not in cuda.calls
    with pytest.raises(UsageError, match="has batch 4"):
        session.run({"noise": noise(4)})


def test_buffers_on_the_device(tmp_path: Path) -> None:
    cuda = HostCuda()
    session = EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))
    places, array = session.buffers(1), noise(1)
    ctypes.memmove(places["noise"], array.ctypes.data, array.nbytes)
    cuda.calls.clear()
    session.run_on_device(1)
    assert "cudaMemcpyAsync" not in cuda.calls
    found = np.empty_like(array)
    ctypes.memmove(found.ctypes.data, places["sample"], found.nbytes)
    np.testing.assert_array_equal(found, expected(array))
    for call in (session.buffers, session.run_on_device):
        with pytest.raises(UsageError, match="has batch 2"):
            call(2)


def test_a_bound_engine_copies_nothing_and_is_timed_by_events(tmp_path: Path) -> None:
    cuda = HostCuda()
    session = EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))
    assert isinstance(session, BindingSession)
    bound = session.bind({"noise": noise(1)})
    assert isinstance(bound, EventTimed)
    before = len(cuda.calls)
    bound()
    assert cuda.calls[before:] == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    np.testing.assert_array_equal(bound.outputs()["sample"], expected(noise(1)))
    before = len(cuda.calls)
    assert bound.device_seconds() == pytest.approx(0.0025)
    assert cuda.calls[before:] == [
        "cudaEventCreate", "cudaEventCreate", "cudaEventRecord", "cudaGraphLaunch", "cudaEventRecord",
        "cudaEventSynchronize", "cudaEventElapsedTime", "cudaEventDestroy", "cudaEventDestroy",
    ]  # fmt: skip
    assert cuda.events == [1, 2]


def test_another_session_has_memory_of_its_own(tmp_path: Path) -> None:
    engine = AddsOne(cuda := HostCuda())
    session = EngineSession(bundle_for(tmp_path), engine, Cuda(cuda))
    other = session.another()
    assert len(engine.contexts) == 2
    assert not set(session.buffers(1).values()) & set(other.buffers(1).values())


def test_a_capture_that_fails_is_done_without(tmp_path: Path) -> None:
    cuda = HostCuda()
    cuda.fail = "cudaStreamEndCapture"
    session = EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))
    np.testing.assert_array_equal(session.run({"noise": noise(1)})["sample"], expected(noise(1)))
    assert "cudaGraphLaunch" not in cuda.calls


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    cuda = HostCuda()
    cuda.fail = "cudaMalloc"
    with pytest.raises(MmdExportError, match="cudaMalloc failed: NO_MEMORY; is the GPU's memory full"):
        EngineSession(bundle_for(tmp_path), AddsOne(cuda), Cuda(cuda))


def test_what_a_failed_call_of_cuda_means() -> None:
    cuda = HostCuda()
    cuda.fail = "cudaStreamCreate"
    for code, words in ((Code.OLD_DRIVER, "update the driver"), (Code.NO_DEVICE, "the driver sees no GPU")):
        cuda.code = code
        with pytest.raises(NotAvailableError, match=f"cudaStreamCreate failed: {code.name}; the driver.*{words[-12:]}"):
            Cuda(cuda).stream()
    cuda.code = Code.OTHER
    with pytest.raises(MmdExportError, match=r"cudaStreamCreate failed: OTHER$"):
        Cuda(cuda).stream()


def test_an_engine_of_something_else(tmp_path: Path) -> None:
    cuda = HostCuda()
    engine = AddsOne(cuda, names=("noise", "timestep", "sample"))
    with pytest.raises(BundleError, match=r"model.onnx has \['noise', 'sample', 'timestep'\], the manifest says"):
        EngineSession(bundle_for(tmp_path), engine, Cuda(cuda))


class Library:
    """As much of the module as loading takes; ``missing`` weights are those that a graph does not have."""

    __name__, __version__ = "tensorrt_rtx", "1.7.1"

    def __init__(self, engine: Any, missing: tuple[str, ...] = (), starts: bool = True) -> None:
        self.engine, self.missing, self.starts = engine, missing, starts
        self.seen: list[int] = []
        self.refitted: list[str] = []
        self.Logger = Called(ERROR=1)

    def Runtime(self, _: Any) -> Any:  # noqa: N802 - the library's name
        if not self.starts:
            raise TypeError("factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self.deserialise)

    def Refitter(self, engine: Any, _: Any) -> Any:  # noqa: N802
        assert engine is self.engine
        return SimpleNamespace(
            get_missing_weights=lambda: list(self.missing), refit_cuda_engine=lambda: self._refit("engine")
        )

    def OnnxParserRefitter(self, _: Any, __: Any) -> Any:  # noqa: N802
        return SimpleNamespace(refit_from_file=lambda path: self._refit(Path(path).name))

    def _refit(self, what: str) -> bool:
        self.refitted.append(what)
        return True

    def deserialise(self, data: bytes) -> Any:
        self.seen.append(len(data))
        return self.engine


class Called(SimpleNamespace):
    """A namespace that can be called, as a class can."""

    def __call__(self, *_: Any) -> None:
        return None


FACTS = LockFacts(RTX.name, "1.7.1", "any", "8.9", "0" * 64)


def without_graph(folder: Path) -> Bundle:
    """A bundle of an engine that has its weights, with nothing beside it."""
    bundle = make(folder, draft=draft(artefact="model.onnx_data"))
    (bundle.folder / "model.onnx").unlink()
    return bundle


def test_an_engine_that_the_library_refuses(tmp_path: Path) -> None:
    bundle = without_graph(tmp_path / "b")
    with pytest.raises(BundleError, match=r"tensorrt_rtx 1.7.1 refuses model.onnx_data; build it again"):
        load_engine(bundle, FACTS, Library(None))


def test_an_engine_without_weights_takes_them_from_the_graph_beside_it(tmp_path: Path) -> None:
    bundle, engine = make(tmp_path / "b", draft=draft(artefact="model.onnx_data")), object()
    facts = replace(FACTS, onnx_sha256=onnx_sha256(bundle.folder / "model.onnx"))
    library = Library(engine)
    assert load_engine(bundle, facts, library) is engine
    assert library.refitted == ["model.onnx", "engine"]
    with pytest.raises(BundleError, match=r"model.onnx_data does not take the weights of model.onnx; build it again"):
        load_engine(bundle, facts, Library(engine, missing=("conv.weight",)))
    other = Library(engine)
    with pytest.raises(BundleError, match=r"model.onnx has SHA-256 .*, its engine was built from 000"):
        load_engine(bundle, FACTS, other)
    assert other.seen == []


def test_a_library_that_does_not_start(tmp_path: Path) -> None:
    bundle = without_graph(tmp_path / "b")
    with pytest.raises(NotAvailableError, match=r"tensorrt_rtx 1.7.1 does not start with driver .*; update the driver"):
        load_engine(bundle, FACTS, Library(None, starts=False))
    missing = replace(RTX, modules=("mmd_no_such_library",))
    with pytest.raises(NotAvailableError, match=r"does not load \(No module named 'mmd_no_such_library'\)"):
        engines._imported(missing)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    cuda = HostCuda()
    monkeypatch.setattr(engines, "find_device", lambda: Device("a GPU", "8.9", "580.65", "13.0"))
    monkeypatch.setattr(engines, "installed", lambda: True)
    monkeypatch.setattr(
        "mmd_export.trt.library.Library.installed", lambda _: SimpleNamespace(available=True, detail="x", install="")
    )
    monkeypatch.setattr("mmd_runtime.cuda._imported", lambda: cuda)
    return cuda


def test_the_lock_is_checked_before_anything_is_deserialised(
    tmp_path: Path, with_gpu: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(AddsOne(with_gpu))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    runtime = EngineRuntime(RTX)
    fields = {"format": RTX.name, "target": RTX.name, "artefact": "model.onnx_data"}
    right = make(tmp_path / "right", draft=draft(**fields, hardware=FACTS.to_dict()))
    for name, wrong in (("version", "1.6.0"), ("capabilities", "12.0"), ("library", "tensorrt")):
        bundle = make(tmp_path / name, draft=draft(**fields, hardware=FACTS.to_dict() | {name: wrong}))
        with pytest.raises(NotAvailableError, match=f"built for .*{wrong}, here is"):
            runtime.open(bundle, RunOptions())
    with pytest.raises(BundleError, match="lacks 'library'"):
        runtime.open(make(tmp_path / "none", draft=draft(**fields)), RunOptions())
    assert library.seen == []
    (right.folder / "model.onnx").unlink()
    session = runtime.open(right, RunOptions())
    assert library.seen == [280]
    np.testing.assert_array_equal(session.run({"noise": noise(1)})["sample"], expected(noise(1)))


def test_states_are_not_seen(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="the states lie inside a compiled engine"):
        EngineRuntime(RTX).open_chain(make(tmp_path / "b"), RunOptions())
