"""Providers of onnxruntime: what is refused, what is told, and runs with inputs and outputs on the device.

The wheels that are tested have the CPU's provider and, on Linux, Azure's, which takes no node of ours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from mmd_export.bundle import BatchSpec, Bundle
from mmd_export.commands.bench import bench
from mmd_export.commands.bench_gate import Gates
from mmd_export.commands.candidates import BenchOptions, Checkpoints, candidates_of
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.numbers import latency_markdown
from mmd_export.parity import check_artefact
from mmd_export.runtime import Availability, BindingSession, Placement, ProviderRuntime, RunOptions, placement_of
from mmd_runtime import registry
from mmd_runtime.onnx_providers import (
    CPU,
    ELSEWHERE,
    PROVIDERS,
    UPDATE_DRIVER,
    Provider,
    ProviderMissingError,
    availability,
    get_provider,
)
from mmd_runtime.onnxruntime import RUNTIME, OnnxRuntime, _GraphSession, _inference_session
from tests.runtime.chains import close, make, noises, reference

OPTIONS = RunOptions(threads=1)
ABSENT = [
    provider
    for provider in PROVIDERS.values()
    if provider.full_name not in ort.get_available_providers() and not provider.plugin
]
NODES = 10  # of the chain


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "chain-2", BatchSpec(sizes=(2,)))


@pytest.fixture
def ranged(tmp_path: Path) -> Bundle:
    return make(tmp_path / "ranged", BatchSpec(range=(1, 8)))


# --- names


def test_a_provider_is_part_of_the_name() -> None:
    runtime = registry.get_runtime("onnxruntime:cpu")
    assert runtime.name == "onnxruntime:cpu"
    assert runtime.formats == RUNTIME.formats
    assert isinstance(RUNTIME, ProviderRuntime)
    names = [each.name for each in registry.every_runtime()]
    assert {f"onnxruntime:{name}" for name in RUNTIME.providers} < set(names)
    assert set(registry.runtime_names()) < set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnxruntime:tpu", "runtime onnxruntime has no provider 'tpu'; known: cpu, cuda, tensorrt, nvtensorrtrtx, "),
        ("onnxruntime:", "runtime onnxruntime has no provider ''"),
        ("torch:cuda", "runtime torch has no providers, 'torch:cuda' names one; leave out ':cuda'"),
        ("tvm:cpu", "runtime 'tvm:cpu' is unknown; known: "),
    ],
)
def test_unknown_names_are_usage_errors(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        registry.get_runtime(name)
    assert str(error.value).startswith(message)


# --- never silently on the CPU


def test_a_provider_that_is_not_there_is_refused(bundle: Bundle) -> None:
    assert len(ABSENT) >= 3
    for provider in ABSENT:
        runtime = RUNTIME.on(provider.name)
        found = runtime.availability()
        assert not found.available
        assert found.install == provider.install
        assert "pip install" in found.install
        with pytest.raises(NotAvailableError, match=f"provider {provider.name} does not work here"):
            runtime.open_chain(bundle, OPTIONS).run_chain(noises(2))
        with pytest.raises(NotAvailableError) as error:
            runtime.open(bundle, OPTIONS)
        assert error.value.exit_code == 3
        assert f"provider {provider.name} does not work here: onnxruntime" in str(error.value)
        assert str(error.value).endswith(provider.install)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_onnxruntime_leaves_out_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = ABSENT[0]
    everything = [provider.full_name, *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)  # as a wheel does that lacks its libraries
    assert provider.device == "cuda"
    for nvidia, move in (
        (None, "with a driver that works is here; run it on a machine that has one"),
        (object(), "pip install"),
    ):
        monkeypatch.setattr("mmd_runtime.onnx_providers.find_device", lambda found=nvidia: found)
        with pytest.raises(NotAvailableError, match=rf"cannot load it, only CPUExecutionProvider.*{move}"):
            RUNTIME.on(provider.name).open(bundle, OPTIONS)
        assert "cannot load it" in RUNTIME.on(provider.name).availability().detail


@pytest.mark.parametrize(
    ("reason", "gpu", "move"),
    [
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", True, UPDATE_DRIVER),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", False, ELSEWHERE),
        ("CUDA failure 804 ; GPU=0", False, UPDATE_DRIVER),
        ("CUDA failure 100: no CUDA-capable device is detected", False, ELSEWHERE),
        ("libcudnn.so.9: cannot open shared object file", True, PROVIDERS["cuda"].install),
    ],
)
def test_a_driver_is_no_matter_of_pip(reason: str, gpu: bool, move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmd_runtime.onnx_providers.find_device", lambda: object() if gpu else None)
    error = ProviderMissingError(PROVIDERS["cuda"], reason)
    assert error.move == move
    assert str(error).endswith(f"{reason}; {move}")


def test_a_driver_that_is_too_old_leaves_the_bundle_whole(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise Fail("CUDA failure 804 ; GPU=0")

    monkeypatch.setattr("mmd_runtime.onnxruntime.open_session", failing)
    with pytest.raises(NotAvailableError, match=f"provider cuda does not work here: .*{UPDATE_DRIVER}"):
        RUNTIME.on("cuda").open(bundle, OPTIONS)


def test_a_provider_that_takes_no_node_is_refused(bundle: Bundle) -> None:
    azure = Provider("azure", "AzureExecutionProvider", "pip install nothing")
    if azure.full_name not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider that takes nothing")
    assert availability(ort, azure).available
    with pytest.raises(
        NotAvailableError, match="azure does not work here: it takes none of the nodes of bundle chain-2"
    ):
        OnnxRuntime(azure).open(bundle, OPTIONS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "has no attribute 'get_library_path'"),
        ("raise OSError('no driver')", "no driver"),
        ("def get_library_path():\n    return '/nowhere/lib.so'\n", "lib.so"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    name = f"plugin_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = availability(ort, Provider("none", "NoneExecutionProvider", "pip install none", plugin=name))
    assert not found.available
    assert reason in found.detail
    assert found.install == "pip install none"


# --- what is told


def test_every_node_is_accounted_for(bundle: Bundle) -> None:
    session = RUNTIME.on("cpu").open(bundle, OPTIONS)
    placement = placement_of(session)
    assert placement == Placement("CPUExecutionProvider", NODES)
    assert placement.summary == f"{NODES} of {NODES} nodes run on CPUExecutionProvider"
    assert placement_of(RUNTIME.open(bundle, OPTIONS)) is None
    inputs = noises(2)
    close(session.run(inputs)["sample"], reference(**inputs)["sample"])


def test_nodes_elsewhere_are_counted_and_named() -> None:
    placement = Placement("CUDAExecutionProvider", 1020, {"CPUExecutionProvider": ("Shape a", "Gather b", "Shape c")})
    assert placement.summary == (
        "1,020 of 1,023 nodes run on CUDAExecutionProvider; 3 on CPUExecutionProvider (2 Shape, 1 Gather)"
    )
    told = placement.to_dict()
    assert told["elsewhere"] == {"CPUExecutionProvider": ["Shape a", "Gather b", "Shape c"]}
    assert json.loads(json.dumps(told)) == told
    assert "not known: old" in Placement("CUDAExecutionProvider", unknown="old").summary


def test_parity_and_latency_tell_it(bundle: Bundle) -> None:
    rung = check_artefact(bundle, RUNTIME.on("cpu"), OPTIONS)
    assert rung.verdict == "passed"
    assert rung.to_dict()["placement"]["taken"] == NODES
    assert check_artefact(bundle, RUNTIME, OPTIONS).to_dict()["placement"] is None
    options = BenchOptions((bundle.folder,), ("onnxruntime",), "onnxruntime:cpu", rounds=2, threads=1)
    report = bench(options)
    assert report.baselines == ("onnxruntime",)
    assert {name: place.taken for name, place in report.placements.items()} == {"chain-2": NODES}
    assert report.to_dict()["placements"]["chain-2"]["provider"] == "CPUExecutionProvider"


def test_another_bundle_is_run_as_the_first_is(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the runtime that was asked for and recorded where it can be, unless ``@`` names another."""
    opened: list[tuple[str, bool]] = []

    def stand_in(runtime: OnnxRuntime, other: Bundle, options: RunOptions) -> object:
        opened.append((runtime.name, options.cuda_graph))
        return _inference_session(other, other.artefact_path, OPTIONS, CPU)

    monkeypatch.setattr(OnnxRuntime, "availability", lambda _: Availability(True, "a stand-in"))
    monkeypatch.setattr(OnnxRuntime, "open", stand_in)
    against = (str(bundle.folder), f"{bundle.folder}@onnxruntime:tensorrt", f"{bundle.folder}@onnxruntime")
    options = BenchOptions((bundle.folder,), against, "onnxruntime:cuda", cuda_graph=True)
    found = candidates_of([bundle], against, 2, options, Checkpoints())
    for each in found:
        each.open()
    graphs = {"onnxruntime:cuda": True, "onnxruntime:tensorrt": True, "onnxruntime": False}
    assert opened == [("onnxruntime:cuda", True), *graphs.items()]
    assert [each.named for each in found] == [False, False, True, True]


# --- inputs and outputs on the device


def test_a_bound_run_gives_what_a_run_gives(ranged: Bundle) -> None:
    session = RUNTIME.open(ranged, OPTIONS)
    assert isinstance(session, BindingSession)
    for count in (1, 3):
        inputs = noises(count)
        bound = session.bind(inputs)
        bound()
        np.testing.assert_array_equal(bound.outputs()["sample"], session.run(inputs)["sample"])
        inputs["noise"][:] = 0  # the device has a copy of its own
        bound()
        close(bound.outputs()["sample"], reference(**noises(count))["sample"])
    with pytest.raises(UsageError, match="'step_noise' is missing"):
        session.bind({"noise": noises(1)["noise"]})


def test_bench_measures_bound_runs_where_there_are_any(bundle: Bundle) -> None:
    options = BenchOptions((bundle.folder,), ("onnxruntime",), rounds=2, threads=1, bound=True)
    report = bench(options)
    assert report.candidates == ("chain-2",)
    assert report.to_dict()["bound"] is True
    assert "the others copy theirs" in latency_markdown(report.to_dict())
    assert "the others copy theirs" not in latency_markdown(replace(report, bound=False).to_dict())


def test_a_gate_on_bound_runs_is_refused_before_anything_is_measured(bundle: Bundle) -> None:
    options = BenchOptions((bundle.folder,), ("onnxruntime",), rounds=6, threads=1, bound=True)
    heard: list[str] = []
    with pytest.raises(UsageError, match="with --bound the bundles alone copy nothing"):
        bench(options, heard.append, Gates.of(None, "5%", None))
    assert heard == []


def test_a_recorded_run_reads_new_inputs_where_the_first_were(bundle: Bundle) -> None:
    session = _GraphSession(bundle, _inference_session(bundle, bundle.artefact_path, OPTIONS, CPU), CPU, Placement(""))
    for seed in (1, 2):
        inputs = {name: np.float32(seed) * array for name, array in noises(2).items()}
        close(session.run(inputs)["sample"], reference(**inputs)["sample"])
    with pytest.raises(UsageError, match="'noise' is missing"):
        session.run({})


def test_cuda_graphs_are_refused_where_there_are_none(bundle: Bundle, ranged: Bundle) -> None:
    options = RunOptions(threads=1, cuda_graph=True)
    for runtime in (RUNTIME, RUNTIME.on("cpu"), RUNTIME.on("coreml")):
        with pytest.raises(NotAvailableError, match="records no CUDA graphs; cuda, tensorrt, nvtensorrtrtx do"):
            runtime.open(bundle, options)
    with pytest.raises(NotAvailableError, match=r"takes batches 1\.\.8, a CUDA graph one size; build with --batch 1$"):
        RUNTIME.on("cuda").open(ranged, options)
    assert get_provider("cuda").graph_option
