"""``build --precision`` end to end: what is verified here, and what only says why it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmd_export.bundle import Bundle
from tests.cli.conftest import Command
from tests.models import tiny

__all__ = ["tiny"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_runs_here_is_verified(command: Command, tmp_path: Path, tiny: Path, precision: str) -> None:
    out = tmp_path / "b"
    arguments = ("build", tiny, "--target", "onnx", "--steps", 2, "--precision", precision, "--calibration", 2)
    code, printed, err = command(*arguments, "--out", out)
    assert code == 0, err
    assert "worst error" in printed
    bundle = Bundle.open(out)
    assert bundle.manifest.precision == precision
    assert bundle.manifest.parity is not None
    assert 0 < max(bundle.manifest.parity.values()) <= bundle.manifest.tolerance.atol
    assert command("verify", out)[0] == 0


def test_bf16_is_built_and_claims_nothing(command: Command, tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "b"
    code, printed, err = command("build", tiny, "--target", "onnx", "--steps", 2, "--precision", "bf16", "--out", out)
    assert code == 0, err
    assert "parity not measured" in printed
    bundle = Bundle.open(out)
    assert bundle.manifest.parity is None
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "warning: not verified: " in err
    assert "**not verified: " in card
    assert "onnxruntime" in card.split("not verified: ")[1].splitlines()[0]
    code, _, err = command("verify", out)
    assert code == 3
    assert "onnxruntime" in err.strip().splitlines()[-1]
