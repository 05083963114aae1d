"""The session of an engine, on stand-ins.

No GPU is here, and nothing else can run an engine, so what is tested is our side of the two interfaces: addresses,
shapes, profiles, copies, captured graphs, and what is said where the other side refuses.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest

from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError
from mmd_export.runtime import BindingSession, EventTimed, Session
from mmd_runtime.cuda import Cuda
from mmd_runtime.engines import EngineSession, profile_of
from tests.runtime.engine_stand_ins import AddsOne, Code, HostCuda, bundle_for, expected, noise


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
    with pytest.raises(NotAvailableError, match=r"cudaMalloc failed: NO_MEMORY; the GPU.s memory is full: free some"):
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
