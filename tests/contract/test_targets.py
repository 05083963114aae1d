"""What every target must do, for each that is found."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmd_export import build as pipeline
from mmd_export import measured
from mmd_export.build import BuildOptions, build, usable_target
from mmd_export.bundle import Bundle, Tolerance
from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import MmdExportError, NotAvailableError, ParityError, UsageError
from mmd_export.program import SamplerProgram, export_program
from mmd_export.target_options import DEFAULTS, TargetOptions
from mmd_export.targets import Compiled, CompileOptions, Target, get_target, target_names
from mmd_export.tolerance import artefact_tolerance, mean_tolerance
from mmd_runtime.registry import runtime_for
from tests.contract.required import skip
from tests.older import needs

pytestmark = pytest.mark.parametrize("name", target_names())


MODEL = "python:tests.foreign_nets:Skip"  # three convolutions, since some compilers take a minute for a UNet


@pytest.fixture(scope="module")
def program() -> SamplerProgram:
    checkpoint = load_checkpoint(MODEL)
    return export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, 1)


def target_here(name: str) -> Target:
    """The target, or a skip that says why it cannot build here."""
    target = get_target(name)
    if not (found := target.availability()).available:
        assert found.detail
        assert "pip install" in found.install
        skip("target", name, f"{found.detail}; {found.install}")
    return target


Files = dict[str, bytes]
Made = tuple[Compiled, Files]


@pytest.fixture(scope="module")
def compiled(program: SamplerProgram, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """What a target makes of the model, compiled once for all tests that only need an artefact."""
    made: dict[str, Made] = {}

    def compile_once(name: str) -> Made:
        if name not in made:
            target, folder = target_here(name), tmp_path_factory.mktemp("compiled")
            options = CompileOptions(target.precisions[0], target.outputs[0])
            made[name] = target.compile(program, folder, options), files_in(folder)
        return made[name]

    return compile_once


@pytest.fixture
def quick(name: str, compiled: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """The target gives its artefact of the model again instead of compiling it again."""
    facts, files = compiled(name)

    def compile_again(program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        assert program.plan.step_count == 2
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return facts

    monkeypatch.setattr(get_target(name), "compile", compile_again)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def options_for(name: str, out: Path, model: str = MODEL, **changes: Any) -> BuildOptions:
    return replace(BuildOptions(model=model, target=name, out=out, steps=2), **changes)


def test_it_keeps_the_protocol(name: str) -> None:
    target = get_target(name)
    assert isinstance(target, Target)
    assert target.name == name
    assert target.precisions
    assert target.outputs
    assert set(target.outputs) <= {"float32", "uint8"}
    assert target.format
    assert target.artefact.startswith("model.")
    for precision in target.precisions:
        tolerance = artefact_tolerance(name, precision)
        assert 0 < tolerance.atol < 2  # the range of a sample
        assert mean_tolerance(tolerance.atol) <= 0.2
        assert "measured" in tolerance.reason


def test_it_compiles_the_same_bytes_twice(
    name: str, program: SamplerProgram, compiled: Callable[[str], Made], tmp_path: Path
) -> None:
    target, (facts, files), folder = target_here(name), compiled(name), tmp_path / "again"
    if name == "torch":
        needs("torch", "2.12", "AOTInductor writes other bytes each time")
    anew = TargetOptions(cache=tmp_path / "cache") if "cache" in target.options else DEFAULTS
    folder.mkdir()
    again = target.compile(program, folder, CompileOptions(target.precisions[0], target.outputs[0], target=anew))
    assert isinstance(facts, Compiled)
    assert facts.toolchain
    assert again == facts
    assert any(path.split("/")[0] == target.artefact for path in files)
    assert files_in(folder) == files
    for data in files.values():
        for private in (tempfile.gettempdir(), str(Path.home()), str(Path(__file__).parents[2]), sys.prefix):
            assert private.encode() not in data


def test_it_tells_the_peak_of_activation_memory(name: str, compiled: Callable[[str], Made]) -> None:
    """By shapes alone, so about that of the ONNX graph whatever compiles it."""
    facts, onnx = compiled(name)[0], compiled("onnx")[0]
    assert facts.graph["peak_activation_bytes"] == pytest.approx(onnx.graph["peak_activation_bytes"], rel=1 / 3)


def test_it_refuses_what_it_has_not(name: str, tmp_path: Path) -> None:
    for field, flag in (("precision", "--precision"), ("output", "--output")):
        with pytest.raises(UsageError, match=f"target {name} has no {flag} int3; it has "):  # nor has another
            build(options_for(name, tmp_path / "out", **{field: "int3"}))
    elsewhere = {each for other in target_names() for each in get_target(other).precisions}
    for precision in sorted(elsewhere - set(get_target(name).precisions)):
        with pytest.raises(NotAvailableError, match=f"target {name} has no --precision {precision}; it has "):
            build(options_for(name, tmp_path / "out", precision=precision))
    assert not list(tmp_path.iterdir())


def test_it_refuses_before_the_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no --precision"):
        build(options_for(name, tmp_path / "out", str(tmp_path / "nowhere"), precision="int3"))
    with pytest.raises(UsageError, match=rf"--target '{name}x' is unknown; known: .*{name}"):
        usable_target(options_for(f"{name}x", tmp_path))


@pytest.mark.usefixtures("quick")
def test_a_build_is_a_whole_bundle(name: str, tmp_path: Path) -> None:
    stages: list[str] = []
    built = build(options_for(name, tmp_path / "out"), notify=stages.append)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest == built.manifest
    assert bundle.manifest.target == name
    assert len(bundle.manifest.plan["steps"]) == bundle.golden().steps == 2
    assert bundle.golden().count >= 4
    assert stages[0] == "reading the checkpoint"
    assert any(name in stage for stage in stages)
    runs = runtime_for(bundle.manifest.format).availability()
    assert (bundle.manifest.parity is not None) == runs.available
    assert ("not verified" in bundle.card) == (not runs.available)
    assert runs.detail in bundle.card
    with pytest.raises(UsageError, match="already exists"):
        build(options_for(name, tmp_path / "out"))


@pytest.mark.usefixtures("quick")
def test_a_build_that_fails_its_parity_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (found := runtime_for(get_target(name).format).availability()).available:
        pytest.skip(f"target {name}: nothing runs it here: {found.detail}; {found.install}")
    monkeypatch.setattr(pipeline, "artefact_tolerance", lambda *_: Tolerance(atol=0.0, reason="nothing passes"))
    with pytest.raises(ParityError, match=r"rung 6 \(artefact in its runtime\) failed: .* the tolerance is 0") as error:
        build(options_for(name, tmp_path / "out"))
    assert error.value.exit_code == 4
    assert "with --skip-verify and look into it with verify" in str(error.value)
    assert ("use --target onnx, or " in str(error.value)) == (get_target(name).format != "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_an_artefact_that_its_runtime_cannot_run_is_not_published(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (found := runtime_for(get_target(name).format).availability()).available:
        pytest.skip(f"target {name}: nothing runs it here: {found.detail}; {found.install}")

    def fails(*_: Any) -> None:
        raise MmdExportError("a kernel gave up")

    monkeypatch.setattr(measured, "check_artefact", fails)
    with pytest.raises(NotAvailableError, match=f"target {name} made what its runtime cannot run: a kernel gave up"):
        build(options_for(name, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_build_that_breaks_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_here(name)

    def compile_half(program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        (folder / target.artefact).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "compile", compile_half)
    with pytest.raises(KeyboardInterrupt):
        build(options_for(name, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
