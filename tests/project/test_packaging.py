"""The wheel and the cost of ``mmd-export --help``; each gate is also seen to fail."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.project import checks


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checks.build_wheel(tmp_path_factory.mktemp("dist"))


def rewrite(wheel: Path, folder: Path, *, drop: str = "", add: str = "") -> Path:
    """A copy of the wheel without the file ``drop`` and with an empty file ``add``."""
    changed = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            if not drop or not name.endswith(drop):
                target.writestr(name, source.read(name))
        if add:
            target.writestr(add, b"")
    return changed


def test_wheel_contains_the_packages_and_nothing_else(wheel: Path) -> None:
    assert checks.check_wheel(wheel, checks.packaged_files()) == []


def test_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert {Path(name).name for name in names} == {"LICENSE", "NOTICE"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"add": "finetune/__init__.py"}, "top-level name 'finetune'"),
        ({"add": "tests/test_plan.py"}, "top-level name 'tests'"),
        ({"add": "mmd_export/left_over.py"}, "mmd_export/left_over.py is not in the tree"),
        ({"drop": "encoders/digits-mlp.safetensors"}, "mmd_finetune/encoders/digits-mlp.safetensors is missing"),
        ({"drop": "mmd_runtime/py.typed"}, "mmd_runtime/py.typed is missing"),
        ({"drop": "entry_points.txt"}, "no console script"),
    ],
)
def test_wheel_check_fails_on(change: dict[str, str], problem: str, wheel: Path, tmp_path: Path) -> None:
    problems = checks.check_wheel(rewrite(wheel, tmp_path, **change), checks.packaged_files())
    assert any(problem in line for line in problems), problems


def test_finetune_and_runtimes_are_no_packages() -> None:
    assert checks.check_bare_folders() == []


def test_bare_folder_check_fails_on_an_init(tmp_path: Path) -> None:
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes/__init__.py").touch()
    assert checks.check_bare_folders(tmp_path) == ["runtimes/__init__.py: must not exist, the folder is no package"]


def test_help_loads_neither_torch_nor_onnx() -> None:
    assert checks.check_light(checks.HELP) == []


def test_help_answers_in_time() -> None:
    assert checks.check_light(checks.HELP) == []  # a command that fails is fast, too
    assert checks.times_as_long(checks.HELP, checks.TYPER) < checks.HELP_TIMES


def test_a_slow_start_is_found() -> None:
    assert checks.times_as_long("import scipy.stats, sklearn.metrics", checks.TYPER, runs=1) > checks.HELP_TIMES


def test_light_check_fails_on_a_heavy_import(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (problem,) = checks.check_light("import torch", extra_path=[tmp_path])
    assert "loads torch" in problem


def test_light_check_fails_on_a_failing_command() -> None:
    (problem,) = checks.check_light("raise ValueError('broken command')")
    assert "exit code 1: ValueError: broken command" in problem


def test_plans_need_the_standard_library_only() -> None:
    assert checks.check_standard_library_only() == []


def test_standard_library_check_fails_on_numpy(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text("import numpy\n")
    (problem,) = checks.check_standard_library_only(["sums"], tmp_path)
    assert "No module named 'numpy'" in problem
