from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.bench import bench
from mmd_export.commands.candidates import BenchOptions
from mmd_export.commands.verify import verify

Written = Callable[[str, Any], Path]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, untuned, 2 steps, batches 1 and 2."""
    out = tmp_path_factory.mktemp("bundles") / "digits-2"
    build(BuildOptions("digits", "onnx", out, steps=2, batch="1,2"))
    return out


@pytest.fixture(scope="session")
def verified(digits: Path) -> dict[str, Any]:
    """JSON of ``verify`` with what the ladder may hold beside: a distribution test and an error budget."""
    found = verify(Bundle.open(digits)).to_dict()
    found.setdefault("not_checked", ["noises that the golden file does not hold"])
    found["verified_fraction"] = 0.75
    return found


@pytest.fixture(scope="session")
def measured(digits: Path) -> dict[str, Any]:
    """JSON of ``bench`` on both batch sizes."""
    options = BenchOptions((digits,), ("onnxruntime",), rounds=12, threads=1, batches=(1, 2), cold=1)
    return bench(options).to_dict()


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Put a value into a JSON file."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write
