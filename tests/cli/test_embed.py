"""``mmd-export embed``: what every kit writes, and what it refuses."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from mmd_export.bundle import Bundle, TensorSpec
from mmd_export.cli_embed import embed
from mmd_export.kit_project import MADE_THERE, Kit, SourceKit, source_files, source_folder
from mmd_export.kits import get_kit, kit_names
from tests.cli.conftest import Command
from tests.export.bundles import UNDRAWN, contents, draft, golden, left_beside, make, undrawn
from tests.kits.engines import engine_bundle
from tests.project.checks import ROOT

ONNX_KITS = [name for name in kit_names() if "onnx" in get_kit(name).formats]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make(tmp_path / "digits-2.bundle").folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "projects" / "app"


@pytest.mark.parametrize("name", kit_names())
def test_a_kit_is_described(name: str) -> None:
    kit = get_kit(name)
    assert isinstance(kit, Kit)
    assert kit.name == name
    assert all([kit.summary, kit.formats, kit.libraries])
    assert isinstance(kit, SourceKit)
    assert kit.run


def test_the_help_names_the_kits_there_are() -> None:
    (option,) = get_type_hints(embed, include_extras=True)["kit"].__metadata__
    assert sorted(re.split(", | or ", option.help)) == sorted(kit_names())


@pytest.mark.parametrize("name", kit_names())
def test_the_wheel_has_the_sources_of_every_kit(name: str) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    shipped, kit = build["targets"]["wheel"]["force-include"], get_kit(name)
    assert isinstance(kit, SourceKit)
    for part in [part for part, _ in kit.parts] + [kit.sources or name]:
        assert shipped[f"runtimes/{part}"] == f"mmd_export/kits/files/{part}"


@pytest.mark.parametrize("name", ONNX_KITS)
def test_a_project_holds_sources_bundle_and_licences(name: str, bundle: Path, out: Path, command: Command) -> None:
    code, shown, error = command("embed", bundle, "--kit", name, "--out", out)
    assert (code, error) == (0, "")
    assert all(line in shown for line in get_kit(name).lines(Bundle.open(bundle).manifest))
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    notes = (out / "LICENSES.md").read_text()
    assert "CC-BY-4.0" in notes
    assert all(library.licence in notes for library in get_kit(name).libraries)
    opened = Bundle.open(bundle)
    assert json.loads((out / "kit.json").read_text())["manifest_sha256"] == opened.manifest.manifest_sha256
    artefacts = [path for path in out.rglob("*") if path.is_file() and path.read_bytes() == bytes(range(256)) * 2]
    assert artefacts, "the artefact of the bundle is not in the project"
    assert left_beside(out) == []


@pytest.mark.parametrize("name", kit_names())
def test_the_readme_has_the_lines_of_the_command(name: str, tmp_path: Path, out: Path, command: Command) -> None:
    for place, each in enumerate(get_kit(name).formats):
        bundle = make(tmp_path / each, draft=draft(format=each)).folder
        assert command("embed", bundle, "--kit", name, "--out", out.with_name(str(place)))[0] == 0
        lines = (out.with_name(str(place)) / "README.md").read_text().splitlines()
        assert [line for line in get_kit(name).lines(Bundle.open(bundle).manifest) if line not in lines] == []


@pytest.mark.parametrize("name", ONNX_KITS)
def test_a_project_of_a_model_with_classes_draws_one(name: str, tmp_path: Path, out: Path, command: Command) -> None:
    labels, few = TensorSpec(name="class_labels", dtype="int64", shape=(1,)), golden()
    few["class_labels"] = np.zeros(len(few["noise"]), np.int64)
    bundle = make(tmp_path / "classes", draft=draft(inputs=(*draft().inputs, labels)), golden=few).folder
    code, shown, error = command("embed", bundle, "--kit", name, "--out", out)
    assert code == 0, error
    readme = (out / "README.md").read_text().splitlines()
    drawing = [line.strip() for line in shown.splitlines() if " --seed " in line]
    assert all(line.endswith(" --class-label 0") and line in readme for line in drawing)
    assert drawing or name == "web"


@pytest.mark.parametrize("name", ONNX_KITS)
@pytest.mark.parametrize("what", UNDRAWN)
def test_what_a_command_cannot_draw_is_not_in_its_lines(
    what: str, name: str, tmp_path: Path, out: Path, command: Command
) -> None:
    bundle = undrawn(tmp_path / "undrawn", what).folder
    code, shown, error = command("embed", bundle, "--kit", name, "--out", out)
    assert code == 0, error
    assert " --seed " not in shown + (out / "README.md").read_text()


def test_the_same_bundle_gives_the_same_project(bundle: Path, out: Path, command: Command) -> None:
    again = out.with_name("again")
    for place in (out, again):
        assert command("embed", bundle, "--kit", "python", "--out", place)[0] == 0
    assert contents(out) == contents(again)


@pytest.mark.parametrize("name", kit_names())
def test_a_wrong_format_is_refused_with_both_values(name: str, tmp_path: Path, out: Path, command: Command) -> None:
    foreign = make(tmp_path / "foreign", draft=draft(format="foreign")).folder
    code, _, error = command("embed", foreign, "--kit", name, "--out", out)
    assert code == 3
    assert f"holds format foreign, kit {name} takes {' or '.join(get_kit(name).formats)}; build for" in error
    assert not out.parent.exists()


@pytest.mark.parametrize("name", [name for name in kit_names() if "tensorrt" in get_kit(name).formats])
def test_an_engine_without_its_weights_is_refused(name: str, tmp_path: Path, out: Path, command: Command) -> None:
    stripped = engine_bundle(tmp_path / "stripped", "1", 1, graph=True)
    code, _, error = command("embed", stripped, "--kit", name, "--out", out)
    assert code == 3
    assert f"without its weights, which kit {name} does not put back; build it without --strip-weights" in error
    assert not out.parent.exists()
    whole = engine_bundle(tmp_path / "whole", "1", 1)
    assert command("embed", whole, "--kit", name, "--out", out)[0] == 0


def test_a_server_is_told_of_code_in_an_engine(tmp_path: Path, out: Path, command: Command) -> None:
    for version_compat in (False, True):
        engine = engine_bundle(tmp_path / f"engine-{version_compat}", "1", 1, version_compat=version_compat)
        place = out.with_name(str(version_compat))
        code, shown, error = command("embed", engine, "--kit", "triton", "--out", place)
        assert code == 0, error
        (server,) = (line.strip() for line in shown.splitlines() if "docker run" in line)
        assert server.endswith(" --backend-config=tensorrt,version-compatible=true") == version_compat
        assert server in (place / "README.md").read_text().splitlines()


def test_float32_stays_float32_on_the_gpu_of_a_server(bundle: Path, out: Path, command: Command) -> None:
    _, shown, _ = command("embed", bundle, "--kit", "triton", "--out", out)
    assert "docker run --rm --gpus all -e NVIDIA_TF32_OVERRIDE=0 " in shown


def test_a_deferred_bundle_is_refused(tmp_path: Path, out: Path, command: Command) -> None:
    recipe = {"format": "tensorrt", "artefact": "model.plan"}
    deferred = make(tmp_path / "deferred", draft=draft(deferred=recipe)).folder
    code, _, error = command("embed", deferred, "--kit", "python", "--out", out)
    assert code == 3
    assert "still to be compiled to tensorrt" in error
    assert "mmd-export finalize" in error


def test_an_unknown_kit_is_a_usage_error(bundle: Path, out: Path, command: Command) -> None:
    code, _, error = command("embed", bundle, "--kit", "cobol", "--out", out)
    assert code == 2
    assert f"--kit 'cobol' is unknown; known: {', '.join(kit_names())}" in error


def test_a_damaged_bundle_is_refused(bundle: Path, out: Path, command: Command) -> None:
    artefact = bundle / "model.onnx"
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"?")
    code, _, error = command("embed", bundle, "--kit", "python", "--out", out)
    assert code == 5
    assert "'model.onnx' has SHA-256" in error
    assert not out.parent.exists()


def test_what_stands_at_out_is_kept(bundle: Path, out: Path, command: Command) -> None:
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    for options in ((), ("--overwrite",)):
        code, _, error = command("embed", bundle, "--kit", "python", "--out", out, *options)
        assert code == 2
        assert "choose another --out" in error
    assert contents(out) == {"mine.txt": b"mine"}


def test_overwrite_replaces_a_project(bundle: Path, out: Path, command: Command) -> None:
    assert command("embed", bundle, "--kit", "python", "--out", out)[0] == 0
    (out / "left_over.py").write_text("")
    assert command("embed", bundle, "--kit", "python", "--out", out, "--overwrite")[0] == 0
    assert not (out / "left_over.py").exists()


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_out_may_not_touch_the_bundle(bundle: Path, place: str, command: Command) -> None:
    before = contents(bundle)
    code, _, error = command("embed", bundle, "--kit", "python", "--out", bundle / place, "--overwrite")
    assert code == 2, error
    assert contents(bundle) == before


def test_a_failure_half_way_leaves_nothing(
    bundle: Path, out: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmd_export.commands.embed.licence_notes", fail)
    code, _, error = command("embed", bundle, "--kit", "python", "--out", out)
    assert code == 1
    assert "No space left on device" in error
    assert list(out.parent.iterdir()) == []


def test_what_a_build_left_is_no_source(tmp_path: Path) -> None:
    for path in ("src/main.cpp", "build/main.o", "web/node_modules/a/index.js", "CMakeLists.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list(source_files(tmp_path)) == ["CMakeLists.txt", "src/main.cpp"]


def test_sources_lie_in_runtimes() -> None:
    folder = source_folder("python-kit")
    assert folder == ROOT / "runtimes/python-kit"
    assert not MADE_THERE & {path.name for path in folder.iterdir() if path.is_file()}
