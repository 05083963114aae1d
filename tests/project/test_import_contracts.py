"""The import contracts of pyproject.toml hold, and an import against each of them is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.checks import PACKAGES, ROOT


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration and the Python files of the three packages."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            target = copy / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return copy


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    folders = [str((tree / package).parent) for package in PACKAGES]
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_contracts_hold(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("mmd_export/plan.py", "import mmd_export.unroll", "Stages look upstream only"),
        ("mmd_export/bundle.py", "import torch", "What runs on a device never needs torch"),
        ("mmd_export/errors.py", "def later(): import torch", "What runs on a device never needs torch"),
        ("runtimes/python/mmd_runtime/registry.py", "import torch", "What runs on a device never needs torch"),
        ("mmd_export/without_a_place.py", "", "Stages look upstream only"),
        ("finetune/mmd_finetune/digits.py", "import mmd_export.targets", "mmd_finetune knows no target"),
        ("runtimes/python/mmd_runtime/registry.py", "import mmd_export.targets", "mmd_runtime knows no target"),
        ("mmd_export/unroll.py", "import mmd_runtime.registry", "Only cli and build reach for targets"),
    ],
)
def test_a_forbidden_import_is_found(file: str, line: str, contract: str, tree: Path) -> None:
    module = tree / file
    original = module.read_text() if module.exists() else None
    module.write_text(f"{original or ''}\n{line}\n")
    try:
        done = lint_imports(tree)
    finally:
        module.unlink() if original is None else module.write_text(original)
    broken = [row for row in done.stdout.splitlines() if contract in row and "BROKEN" in row]
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken, done.stdout
