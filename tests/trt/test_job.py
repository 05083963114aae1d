"""The job of the builder's process: profiles, its way through JSON, the key of its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmd_export.batch import BatchSpec
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.target_options import TargetOptions
from mmd_export.trt.cache import cache_folder, find, key_of, store
from mmd_export.trt.device import Device
from mmd_export.trt.engine import Request, engine_key, job_for, require_capable, require_gpu_where_needed
from mmd_export.trt.job import Job, profile_batches
from mmd_export.trt.library import RTX, TENSORRT, Library
from tests.trt.conftest import OneNode

GPU = Device("a GPU", "8.9", "580.65", "13.0")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ("1", ()),
        ("4", ()),
        ("3..3", ()),
        ("1..8", ((1, 8, 8),)),
        ("1,4,8", ((1, 1, 1), (4, 4, 4), (8, 8, 8))),
    ],
)
def test_profiles(batch: str, expected: tuple[tuple[int, int, int], ...]) -> None:
    spec = BatchSpec.parse(batch)
    assert profile_batches(spec.sizes, spec.range) == expected


def test_a_job_survives_its_way_to_the_process() -> None:
    job = Job("m", "a.onnx", "b.plan", ((1, 2, 2),), ("8.9",), "8.0", 64, 512, "ampere+", True, True, True, "t.bin")
    assert Job.from_json(job.to_json()) == job
    assert "\n" not in job.to_json()


def request(onnx: Path, **options: Any) -> Request:
    return Request(onnx, BatchSpec(sizes=(1,)), TargetOptions(**options))


@pytest.mark.parametrize("capabilities", ["8.0", "12.0,8.6"])
def test_gpus_that_lack_the_precision_are_refused_before_the_build(capabilities: str, one_node: OneNode) -> None:
    plain = request(one_node("Relu", (1, 1)), compute_capability=capabilities)
    require_capable("fp32", plain.options)
    with pytest.raises(NotAvailableError, match=r"fp8 needs compute capability 8\.9, --compute-capability has 8\."):
        require_capable("fp8", plain.options)
    require_capable("fp8", TargetOptions(compute_capability="12.0"))
    with pytest.raises(NotAvailableError, match=r"bf16 needs compute capability 8\.0, --compute-capability has 7\.5"):
        require_capable("bf16", TargetOptions(compute_capability="12.0,7.5"))
    require_capable("bf16", TargetOptions(compute_capability="8.0"))


def key(library: Library, asked: Request, device: Device | None = None) -> str:
    job = job_for(library, asked, Path("e"), Path("c"), device)
    return engine_key(library, job, "0" * 64, "1.0", device)


def test_the_key_covers_what_the_bytes_depend_on(
    one_node: OneNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = request(one_node("Relu", (1, 1)))
    base = key(RTX, plain)
    for changed in (
        request(plain.onnx, workspace=64),
        request(plain.onnx, refit=True),
        request(plain.onnx, strip_weights=True),
        request(plain.onnx, compute_capability="8.9"),
        replace(plain, batch=BatchSpec(range=(1, 2))),
        replace(plain, precision="fp8"),  # for other GPUs, if none are named
    ):
        assert key(RTX, changed) != base
    job = job_for(RTX, plain, Path("e"), Path("c"), None)
    assert engine_key(RTX, job, "1" * 64, "1.0", None) != base
    assert engine_key(RTX, job, "0" * 64, "1.1", None) != base
    with monkeypatch.context() as patch:  # a builder that asks the library for something else
        (tmp_path / "worker.py").write_text("other")
        patch.setattr("mmd_export.trt.engine._BUILDER", (tmp_path / "worker.py",))
        assert engine_key(RTX, job, "0" * 64, "1.0", None) != base
    for same in (request(plain.onnx, memory_limit=4096), request(plain.onnx, cache=tmp_path)):
        assert key(RTX, same) == base
    assert key(RTX, plain, GPU) == base  # TensorRT-RTX builds the same on every machine
    other = replace(GPU, capability="9.0")
    assert key(TENSORRT, plain, GPU) != key(TENSORRT, plain, other)


def test_only_the_library_that_measures_keeps_timings(one_node: OneNode) -> None:
    asked = request(one_node("Relu", (1, 1)))
    assert job_for(RTX, asked, Path("e"), Path("c"), GPU).timing_cache is None
    timings = job_for(TENSORRT, asked, Path("e"), Path("c"), GPU, "10.1").timing_cache
    assert timings is not None
    assert "10.1" in timings
    assert "8.9" in timings


def test_a_gpu_is_asked_for_where_one_is_needed() -> None:
    require_gpu_where_needed(RTX, TargetOptions(), None)
    require_gpu_where_needed(TENSORRT, TargetOptions(refit=True), GPU)
    with pytest.raises(NotAvailableError, match=r"TensorRT builds for the GPU at hand, .* --defer"):
        require_gpu_where_needed(TENSORRT, TargetOptions(), None)
    for options in (TargetOptions(refit=True), TargetOptions(strip_weights=True)):
        with pytest.raises(NotAvailableError, match=r"TensorRT-RTX needs a GPU for --(refit|strip-weights)"):
            require_gpu_where_needed(RTX, options, None)


def test_what_is_stored_is_found_whole_or_not_at_all(tmp_path: Path) -> None:
    engine, folder, copy = tmp_path / "engine", tmp_path / "cache", tmp_path / "copy"
    engine.write_bytes(b"an engine")
    name = key_of({"a": 1})
    assert name != key_of({"a": 2})
    assert find(folder, name, copy) is None
    store(folder, name, engine, {"version": "1"})
    assert find(folder, name, copy) == {"version": "1"}
    assert copy.read_bytes() == b"an engine"
    (folder / f"{name}.engine").write_bytes(b"an Engine")
    copy.unlink()
    assert find(folder, name, copy) is None
    assert not copy.exists()
    assert len(list(folder.iterdir())) == 2


def test_an_engine_that_could_not_be_stored_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, folder = tmp_path / "engine", tmp_path / "cache"
    engine.write_bytes(b"an engine")
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        whole(self, data[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        store(folder, key_of({}), engine, {"version": "1"})
    assert list(folder.iterdir()) == []


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.setenv("MMD_EXPORT_CACHE", str(tmp_path / "named"))
    assert cache_folder(None) == tmp_path / "named"
    monkeypatch.delenv("MMD_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder(None).name == "engines"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": 0}, "--workspace is 0 MiB; it must be from 1 to 2,147,483,648"),
        ({"workspace": 10**14}, "--workspace is 100000000000000 MiB; it must be from 1 to 2,147,483,648"),
        ({"memory_limit": -1}, "--memory-limit is -1 MiB"),
        ({"hardware_compat": "volta"}, r"--hardware-compat is 'volta'; give ampere\+ or same-compute-capability"),
        ({"compute_capability": "sm89"}, "--compute-capability is 'sm89'; give numbers such as 8.9,12.0"),
        ({"compute_capability": "8.9,"}, "--compute-capability is '8.9,'"),
    ],
)
def test_options_that_no_target_could_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TargetOptions(**options)


def test_a_recipe_leaves_out_what_is_of_the_machine(tmp_path: Path) -> None:
    options = TargetOptions(workspace=64, refit=True, memory_limit=512, cache=tmp_path)
    assert options.recipe() == {"workspace": 64, "refit": True}
    assert TargetOptions.from_recipe(options.recipe(), tmp_path, 512) == options
    with pytest.raises(UsageError, match="unknown option 'speed'"):
        TargetOptions.from_recipe({"speed": 1}, None, None)
