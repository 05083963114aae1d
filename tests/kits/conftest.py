"""A real bundle for the kits, and every damaged copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ray_service import make_project
from mmd_export.build import BuildOptions, build
from tests.attacks import write_attacks


@pytest.fixture(scope="session")
def digits_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, untuned, 2 steps, batch 1, as ONNX."""
    out = tmp_path_factory.mktemp("bundles") / "digits-onnx"
    build(BuildOptions("digits", "onnx", out, steps=2, verify=False))
    return out


@pytest.fixture(scope="session")
def digits_batched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for 1 to 4 images a run."""
    out = tmp_path_factory.mktemp("bundles") / "digits-batched"
    build(BuildOptions("digits", "onnx", out, steps=2, batch="1..4", verify=False))
    return out


@pytest.fixture(scope="session")
def ray_project(digits_batched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of kit ``ray`` with limits so small that a test reaches them."""
    small = {"max_count": 8, "max_ongoing_requests": 2, "max_queued_requests": 2, "cpus": 0.5}
    return make_project(digits_batched, tmp_path_factory.mktemp("projects") / "ray", small)


@pytest.fixture(scope="session")
def attacks(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a damaged copy of it an attack, and ``index.json``."""
    out = tmp_path_factory.mktemp("attacks")
    write_attacks(digits_onnx, out)
    return out
