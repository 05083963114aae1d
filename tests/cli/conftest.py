from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.cli import app, run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, untuned, 2 steps, batch 1."""
    out = tmp_path_factory.mktemp("bundles") / "digits-2"
    build(BuildOptions("digits", "onnx", out, steps=2))
    return out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command in this process; exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(app, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
