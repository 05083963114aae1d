"""Engines and deferred bundles of TensorRT-RTX, built for real; nothing here runs an engine, which takes a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import BatchSpec, Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.commands.finalize import FinalizeOptions, finalize
from mmd_export.commands.verify import usable_runtime, verify
from mmd_export.errors import BundleError, NotAvailableError, UsageError
from mmd_export.program import SamplerProgram, export_program
from mmd_export.runtime import Availability, RunOptions
from mmd_export.target_options import TargetOptions
from mmd_export.targets import CompileOptions, DeferrableTarget, get_target
from mmd_export.targets.onnx import OnnxTarget
from mmd_export.trt.engine import onnx_sha256
from mmd_export.trt.job import Job
from mmd_export.trt.library import RTX, TENSORRT
from mmd_export.trt.lock import LockFacts
from mmd_export.trt.packing import read_engine
from mmd_runtime.engines import require_graph
from mmd_runtime.registry import get_runtime
from tests.cli.conftest import Command
from tests.export.bundles import contents, draft, make

CAPABILITIES = "8.9,12.0"
GPU = get_runtime(RTX.name).availability()


def options(model: object, out: Path, **changes: Any) -> BuildOptions:
    given = {"steps": 1, "of_target": TargetOptions(compute_capability=CAPABILITIES), **changes}
    return BuildOptions(str(model), RTX.name, out, **given)


@pytest.fixture(scope="session")
def deferred(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model in one step, to be compiled later for two compute capabilities."""
    return build(options("digits", tmp_path_factory.mktemp("deferred") / "digits", defer=True))


@pytest.fixture(scope="session")
def engine(_rtx: None, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, compiled at once."""
    return build(options("digits", tmp_path_factory.mktemp("engine") / "digits"))


@pytest.fixture(scope="session")
def finalized(_rtx: None, deferred: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The deferred bundle, finalized with an empty cache."""
    folder = tmp_path_factory.mktemp("finalized")
    return finalize(FinalizeOptions(deferred.folder, folder / "digits", cache=folder / "cache"))


def test_the_manifest_says_what_it_is_locked_to(engine: Bundle, deferred: Bundle) -> None:
    facts = LockFacts.read(engine.name, engine.manifest.hardware)
    assert (facts.library, facts.version, facts.capabilities) == (RTX.name, RTX.version, CAPABILITIES)
    assert facts.onnx_sha256 == onnx_sha256(deferred.artefact_path)
    assert engine.manifest.format == RTX.name
    assert engine.manifest.toolchain[RTX.name] == RTX.version
    assert engine.manifest.graph == deferred.manifest.graph
    assert f"capabilities {CAPABILITIES}" in engine.card


def test_two_builds_are_the_same_bytes(engine: Bundle, finalized: Bundle) -> None:
    """One at once, one deferred and finalized with another cache: nothing but the way there differs."""
    assert contents(engine.folder) == contents(finalized.folder)
    assert finalized.manifest.deferred is None
    assert finalized.manifest.hardware == engine.manifest.hardware


@pytest.mark.skipif(GPU.available, reason="a GPU is here: it was verified")
def test_without_a_gpu_it_is_not_verified_and_says_so(finalized: Bundle) -> None:
    assert finalized.manifest.parity is None
    assert "not verified: runtime tensorrt-rtx: " in finalized.card
    assert "no NVIDIA GPU" in finalized.card or "cuda-python" in finalized.card
    with pytest.raises(NotAvailableError, match="runtime tensorrt-rtx: "):
        get_runtime(RTX.name).open(finalized, RunOptions())
    with pytest.raises(NotAvailableError, match="runtime tensorrt-rtx does not work here"):
        usable_runtime(finalized, None)


def test_an_engine_was_built_before(engine: Bundle, deferred: Bundle, tmp_path: Path) -> None:
    heard: list[str] = []
    again = finalize(FinalizeOptions(deferred.folder, tmp_path / "again"), heard.append)
    assert any("was built before, taken from" in line for line in heard)
    assert not any("takes " in line for line in heard)
    assert contents(again.folder) == contents(engine.folder)


def steps_of(model: str, steps: int) -> SamplerProgram:
    checkpoint = load_checkpoint(model)
    return export_program(checkpoint.denoiser, checkpoint.plan_for(steps), checkpoint.shape, 1)


@pytest.fixture(scope="session")
def attention(tiny_attention: Path) -> SamplerProgram:
    return steps_of(str(tiny_attention), 1)


@pytest.fixture(scope="session")
def digits() -> SamplerProgram:
    return steps_of("digits", 1)


@pytest.mark.usefixtures("_rtx")
def test_levels_are_cast_where_the_network_ends(attention: SamplerProgram, tmp_path: Path) -> None:
    """Its parser takes UINT8 there alone."""
    wanted = CompileOptions("fp32", "uint8", target=TargetOptions(compute_capability="8.9"))
    get_target(RTX.name).compile(attention, tmp_path, wanted)
    assert (tmp_path / "model.plan").stat().st_size > 0


@pytest.mark.usefixtures("_rtx")
@pytest.mark.parametrize(
    ("model", "precision"),
    [*(("attention", name) for name in get_target(RTX.name).precisions),
     *(("digits", name) for name in ("fp16", "bf16", "int8"))],  # fp32 is test_two_builds_are_the_same_bytes
)  # fmt: skip
def test_every_precision_is_the_same_bytes_twice(
    model: str, precision: str, attention: SamplerProgram, digits: SamplerProgram, tmp_path: Path
) -> None:
    """Digits and a small network with attention, in a process of its own each time, with a cache of its own."""
    program = {"attention": attention, "digits": digits}[model]
    get_target("onnx").compile(program, tmp_path, CompileOptions(precision))
    target, engines = get_target(RTX.name), []
    assert isinstance(target, DeferrableTarget)
    for name in ("1", "2"):
        chosen = TargetOptions(compute_capability=CAPABILITIES, cache=tmp_path / f"cache-{name}")
        (folder := tmp_path / name).mkdir()
        facts = target.compile_onnx(tmp_path / "model.onnx", folder, CompileOptions(precision, target=chosen))
        engines.append((folder / "model.plan").read_bytes())
        assert facts.capabilities == CAPABILITIES
    assert engines[0] == engines[1]
    assert len(engines[0]) > 2**20


@pytest.mark.usefixtures("_rtx")
@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_steps_share_quantised_weights(precision: str, tmp_path: Path) -> None:
    """The graph in the bundle stores them once; the library gets a copy for each matrix product."""
    target = get_target(RTX.name)
    assert isinstance(target, DeferrableTarget)
    get_target("onnx").compile(steps_of("digits", 2), tmp_path, CompileOptions(precision))
    (folder := tmp_path / "engine").mkdir()
    before = (tmp_path / "model.onnx").read_bytes()
    chosen = TargetOptions(compute_capability="8.9", cache=tmp_path / "cache")
    facts = target.compile_onnx(tmp_path / "model.onnx", folder, CompileOptions(precision, target=chosen))
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert facts.onnx_sha256 == onnx_sha256(tmp_path / "model.onnx")
    assert (folder / "model.plan").stat().st_size > 2**20


@pytest.mark.usefixtures("_rtx")
@pytest.mark.parametrize("model", ["digits", "labels"])
def test_a_loop_has_products_of_quantised_weights(model: str, tiny_labels: Path, tmp_path: Path) -> None:
    """Query, key and value of one value, or the time projections of a network that takes labels."""
    chosen = TargetOptions(compute_capability="8.9", cache=tmp_path / "cache")
    source = tiny_labels if model == "labels" else model
    bundle = build(options(source, tmp_path / "out", precision="w8", form="loop", steps=2, of_target=chosen))
    assert bundle.artefact_path.stat().st_size > 2**20


@pytest.mark.usefixtures("_rtx")
def test_beside_a_stripped_engine_lies_the_graph_that_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of the weights a step, as the builder got it; the library strips weights on a GPU only."""
    target, given = get_target(RTX.name), list[bytes]()
    assert isinstance(target, DeferrableTarget)

    def run_job(job: Job, *_: Any) -> dict[str, Any]:
        given.append(Path(job.onnx).read_bytes())
        Path(job.engine).write_bytes(b"engine")
        return {"version": "1", "capabilities": ["8.9"]}

    monkeypatch.setattr("mmd_export.trt.engine.run_job", run_job)
    monkeypatch.setattr("mmd_export.trt.engine.require_gpu_where_needed", lambda *_: None)
    get_target("onnx").compile(steps_of("digits", 2), tmp_path, CompileOptions("w8"))
    (folder := tmp_path / "engine").mkdir()
    chosen = TargetOptions(strip_weights=True, cache=tmp_path / "cache")
    facts = target.compile_onnx(tmp_path / "model.onnx", folder, CompileOptions("w8", target=chosen))
    assert given == [(folder / "model.onnx").read_bytes()]
    assert given != [(tmp_path / "model.onnx").read_bytes()]
    assert facts.onnx_sha256 == onnx_sha256(folder / "model.onnx") != onnx_sha256(tmp_path / "model.onnx")


@pytest.mark.usefixtures("_rtx")
def test_what_no_gpu_that_is_named_can_do_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    chosen = TargetOptions(compute_capability="8.0")
    with pytest.raises(NotAvailableError, match=r"fp8 needs compute capability 8\.9, --compute-capability has 8\.0"):
        build(options(tmp_path / "none", tmp_path / "out", precision="fp8", of_target=chosen))


def test_options_of_compiling_belong_to_finalize(tmp_path: Path) -> None:
    chosen = TargetOptions(cache=tmp_path / "cache", memory_limit=16)
    with pytest.raises(UsageError, match="--defer compiles nothing here; give --cache and --memory-limit to finalize"):
        build(options("digits", tmp_path / "out", defer=True, of_target=chosen))


def test_what_the_device_must_not_be_given_is_not_deferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmd_export.trt.lint.engine_faults", lambda _: ["node 'a' (Attention)", "another"])
    with pytest.raises(NotAvailableError, match=r"^TensorRT-RTX cannot be given node 'a' \(Attention\) and 1 more"):
        build(options("python:tests.foreign_nets:Plain", tmp_path / "out", defer=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_rtx")
def test_weights_beside_the_graph_are_found(attention: SamplerProgram, tmp_path: Path) -> None:
    target, engines = get_target(RTX.name), []
    assert isinstance(target, DeferrableTarget)
    for name, limit in (("inside", 2**30), ("beside", 1000)):
        (folder := tmp_path / name).mkdir()
        OnnxTarget(limit).compile(attention, folder, CompileOptions())
        chosen = TargetOptions(compute_capability=CAPABILITIES)
        target.compile_onnx(folder / "model.onnx", folder, CompileOptions(target=chosen))
        engines.append((folder / "model.plan").read_bytes())
    assert (tmp_path / "beside" / "model.onnx_data").exists()
    assert len(engines[0]) == len(engines[1])
    assert onnx_sha256(tmp_path / "inside" / "model.onnx") != onnx_sha256(tmp_path / "beside" / "model.onnx")


@pytest.mark.usefixtures("_rtx")
def test_a_cache_that_cannot_be(deferred: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    chosen = TargetOptions(cache=tmp_path / "file" / "cache")
    refusal = r"--cache .*file/cache cannot be made: Not a directory; choose another"
    with pytest.raises(UsageError, match=refusal):
        finalize(FinalizeOptions(deferred.folder, tmp_path / "b", cache=chosen.cache))
    with pytest.raises(UsageError, match=refusal):
        build(BuildOptions("is not read", "tensorrt-rtx", tmp_path / "b", of_target=chosen))
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("_rtx")
def test_a_cache_that_is_full_costs_no_engine(
    deferred: Bundle, engine: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    heard: list[str] = []
    monkeypatch.setattr("mmd_export.trt.engine.store", full)
    made = finalize(FinalizeOptions(deferred.folder, tmp_path / "b", cache=tmp_path / "cache"), heard.append)
    assert contents(made.folder) == contents(engine.folder)
    assert any(line.endswith("cannot keep the engine: No space left on device") for line in heard)


@pytest.mark.usefixtures("_rtx")
def test_finalizing_takes_no_torch(deferred: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None; from pathlib import Path; "
        "from mmd_export.commands.finalize import FinalizeOptions, finalize; "
        "print(finalize(FinalizeOptions(Path(sys.argv[1]), Path(sys.argv[2]))).manifest.format)"
    )
    command = [sys.executable, "-c", code, str(deferred.folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [RTX.name]


@pytest.mark.usefixtures("_rtx")
def test_a_list_of_batches_is_a_profile_each(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    free = export_program(tiny_checkpoint.denoiser, tiny_checkpoint.plan_for(1), tiny_checkpoint.shape, None)
    heard: list[str] = []
    chosen, batch = TargetOptions(compute_capability="8.9"), BatchSpec.parse("1,2")
    told = CompileOptions(batch=batch, target=chosen, notify=heard.append)
    get_target(RTX.name).compile(free, tmp_path, told)
    assert "TensorRT-RTX takes every node" in heard
    assert (tmp_path / "model.plan").stat().st_size > 2**20


def test_a_deferred_bundle_is_verified_through_its_graph(deferred: Bundle) -> None:
    assert deferred.manifest.target == RTX.name
    assert deferred.manifest.format == "onnx"
    assert deferred.manifest.parity is not None
    report = verify(deferred)
    assert report.passed
    assert report.runtime == "onnxruntime"
    assert "to be compiled | for tensorrt-rtx with compute_capability 8.9,12.0" in deferred.card
    recipe = deferred.manifest.deferred
    assert recipe is not None
    assert recipe.options == {"compute_capability": CAPABILITIES}


def test_it_is_made_where_the_library_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    missing = Availability(False, "tensorrt is not installed", TENSORRT.install)
    monkeypatch.setattr("mmd_export.trt.library.Library.installed", lambda _: missing)
    arguments = ("build", "digits", "--target", TENSORRT.name, "--steps", 1, "--workspace", 64, "--out", tmp_path / "b")
    code, _, err = command(*arguments)
    assert code == 3
    assert "tensorrt is not installed; pip install 'mmd-export[tune,tensorrt]'; or add --defer" in err
    code, out, err = command(*arguments, "--defer", "--skip-verify")
    assert code == 0, err
    assert f"next, where it will run: mmd-export finalize {tmp_path / 'b'}" in out
    bundle, before = Bundle.open(tmp_path / "b"), contents(tmp_path / "b")
    assert bundle.manifest.deferred is not None
    assert bundle.manifest.deferred.options == {"workspace": 64}
    assert "| graph | 0 nodes" not in bundle.card
    code, _, err = command("finalize", tmp_path / "b")
    assert code == 3
    assert "target tensorrt cannot build here: tensorrt is not installed" in err
    assert contents(bundle.folder) == before


def test_in_place_all_of_it_or_nothing(deferred: Bundle, engine: Bundle, tmp_path: Path, command: Command) -> None:
    import shutil

    place = tmp_path / "mine"
    shutil.copytree(deferred.folder, place)
    before = contents(place)
    if not GPU.available:
        code, _, err = command("finalize", place)
        assert code == 3
        assert "its engine cannot be verified here (runtime tensorrt-rtx: " in err
        assert "name another folder with --out, or pass --skip-verify" in err
        assert contents(place) == before
    limits = ("--memory-limit", 8, "--cache", tmp_path / "empty")
    code, _, err = command("finalize", place, "--skip-verify", *limits)
    assert code == 3
    assert "--memory-limit is 8 MiB; try more" in err
    assert contents(place) == before
    code, out, err = command("finalize", place, "--skip-verify")
    assert code == 0, err
    assert "model.plan" in out
    assert "parity not measured" in out
    assert (place / "model.plan").read_bytes() == engine.artefact_path.read_bytes()


@pytest.mark.usefixtures("_rtx")
def test_a_packed_engine_is_the_same_engine(engine: Bundle, tmp_path: Path, command: Command) -> None:
    arguments = ("build", "digits", "--steps", 1, "--target", RTX.name, "--compute-capability", CAPABILITIES)
    code, out, err = command(*arguments, "--compress", "--defer", "--skip-verify", "--out", tmp_path / "b")
    assert code == 0, err
    code, out, err = command("finalize", tmp_path / "b", "--skip-verify")
    assert code == 0, err
    assert "model.plan.xz" in out
    packed = Bundle.open(tmp_path / "b")
    assert sorted(path.name for path in packed.folder.glob("model*")) == ["model.plan.xz"]
    assert read_engine(packed.artefact_path) == engine.artefact_path.read_bytes()
    assert packed.artefact_bytes < 0.6 * engine.artefact_bytes
    code, out, err = command(*arguments, "--compress", "--skip-verify", "--out", tmp_path / "at-once")
    assert (code, "model.plan.xz" in out) == (0, True), err
    assert read_engine(Bundle.open(tmp_path / "at-once").artefact_path) == engine.artefact_path.read_bytes()
    code, _, err = command("build", "digits", "--steps", 1, "--target", "onnx", "--compress", "--out", tmp_path / "c")
    assert (code, "target onnx has no --compress" in err) == (3, True)


def test_what_is_not_deferred_is_not_finalized(engine: Bundle, tmp_path: Path, command: Command) -> None:
    code, _, err = command("finalize", engine.folder, "--out", tmp_path / "b")
    assert code == 2
    assert "is not deferred, it holds model.plan; use it as it is" in err
    assert not (tmp_path / "b").exists()


def test_it_replaces_nothing_unasked(deferred: Bundle, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        finalize(FinalizeOptions(deferred.folder, tmp_path / "b"))


def test_only_compilers_of_graphs_defer(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="target onnx has no --defer"):
        build(BuildOptions("digits", "onnx", tmp_path / "b", steps=1, defer=True))


@pytest.mark.parametrize(("name", "flag"), [("hardware_compat", "ampere+"), ("version_compat", True)])
def test_options_of_the_other_library(name: str, flag: Any, tmp_path: Path) -> None:
    wanted = options("digits", tmp_path / "b", of_target=TargetOptions(**{name: flag}))
    with pytest.raises(NotAvailableError, match=f"target tensorrt-rtx has no --{name.replace('_', '-')}; it has "):
        build(wanted)
    other = TargetOptions(compute_capability="8.9")
    with pytest.raises(NotAvailableError, match="target tensorrt has no --compute-capability"):
        build(BuildOptions("digits", TENSORRT.name, tmp_path / "b", steps=1, of_target=other))


def damaged(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], None]) -> Bundle:
    """A sealed bundle whose manifest says something else."""
    fields = bundle.manifest.model_dump(mode="json")
    change(fields)
    kept = {name: value for name, value in fields.items() if name not in ("files", "manifest_sha256")}
    return make(folder / "damaged", draft=draft(**{**kept, "artefact": "model.onnx", "inputs": draft().inputs,
                                                   "outputs": draft().outputs, "plan": draft().plan}))  # fmt: skip


def test_a_recipe_of_a_newer_release(deferred: Bundle, tmp_path: Path) -> None:
    def faster(fields: dict[str, Any]) -> None:
        fields["deferred"]["options"]["warp_speed"] = 9

    newer = damaged(deferred, tmp_path, faster)
    with pytest.raises(UsageError, match="unknown option 'warp_speed'; update mmd-export"):
        finalize(FinalizeOptions(newer.folder, tmp_path / "out"))


def test_a_recipe_for_a_target_that_compiles_no_graph(deferred: Bundle, tmp_path: Path) -> None:
    wrong = damaged(deferred, tmp_path, lambda fields: fields.update(target="onnx"))
    with pytest.raises(UsageError, match="deferred for onnx, which compiles no graph"):
        finalize(FinalizeOptions(wrong.folder, tmp_path / "out"))


def test_bundles_that_are_not_deferred_have_no_such_field(tmp_path: Path) -> None:
    bundle = make(tmp_path / "old")
    assert "deferred" not in json.loads((bundle.folder / "manifest.json").read_text())
    assert Bundle.open(bundle.folder).manifest.deferred is None


def test_the_graph_beside_a_stripped_engine_must_be_its_own(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    facts = LockFacts("tensorrt", "10.1", "any", "8.9", onnx_sha256(bundle.folder / "model.onnx"))
    require_graph(bundle, facts)
    with pytest.raises(BundleError, match=r"model.onnx has SHA-256 [0-9a-f]{64}, its engine was built from 000"):
        require_graph(bundle, LockFacts("tensorrt", "10.1", "any", "8.9", "0" * 64))
