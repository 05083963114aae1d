"""From a bundle to an engine, on stand-ins of the two libraries: locks, weights from a graph, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.runtime import RunOptions
from mmd_export.trt.device import Device
from mmd_export.trt.engine import onnx_sha256
from mmd_export.trt.library import RTX
from mmd_export.trt.lock import LockFacts
from mmd_export.trt.packing import pack
from mmd_runtime import engines
from mmd_runtime.engines import EngineRuntime, load_engine
from tests.export.bundles import draft, make
from tests.runtime.engine_stand_ins import AddsOne, HostCuda, expected, noise


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


def test_a_packed_engine_is_unpacked_for_the_library(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"code" * 1000)
    pack(tmp_path / "model.plan", tmp_path / "model.plan.xz")
    bundle = SimpleNamespace(
        name="b", folder=tmp_path, artefact_path=tmp_path / "model.plan.xz",
        manifest=SimpleNamespace(artefact="model.plan.xz"),
    )  # fmt: skip
    library = Library(engine := object())
    assert load_engine(cast(Bundle, bundle), FACTS, library) is engine
    assert library.seen == [4000]


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
