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


@pytest.fixture(scope="session")
def longer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three times the work of ``digits_bundle``, batches 1 and 3."""
    out = tmp_path_factory.mktemp("bundles") / "digits-6"
    build(BuildOptions("digits", "onnx", out, steps=6, batch="1,3", verify=False))
    return out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command in this process; exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(app, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def fails(command: Command, code: int, says: str, *arguments: object) -> str:
    """Hold one command to its exit code and its one line, which is returned."""
    found, _, err = command(*arguments)
    last = err.strip().splitlines()[-1]
    assert found == code, err
    assert says in last
    assert "Traceback" not in err
    return last
