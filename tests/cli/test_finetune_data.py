"""Encoders and data on the command line: what is refused, with which exit code, and what a run says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmd_finetune.encoders import encoder_forms
from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--features", "inception:nowhere.pth"), "encoder inception:nowhere.pth: the file does not exist"),
        (("--holdout", "clip:./nowhere"), "encoder clip:./nowhere does not exist"),
        (
            ("--features", "vgg"),
            "encoder 'vgg' is unknown; known: digits-conv, digits-mlp, digits-residual, pixels, random-conv",
        ),
        (("--data", "hf:./nowhere"), "./nowhere does not exist"),
        (("--resize", "squash"), "--resize is 'squash'; choose 'crop' or 'stretch'"),
        (("--crop", "1,2,3"), "crop"),
        (("--crop", "0,0,9,9"), "--crop 0,0,9,9 (left, top, width, height) reaches outside"),
        (("--holdout-fraction", "1"), "--holdout-fraction is 1; it must be below 1"),
        (("--balance", "loud"), "--balance is 'loud'; choose 'auto', 'untuned' or 'equal'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: tuple[str, ...], said: str, command: Command, tmp_path: Path
) -> None:
    code, out, err = command("finetune", "digits", "--steps", 2, "--out", tmp_path / "run", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("mmd-export: error")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_nan_pixels_stop_before_the_first_step(command: Command, tmp_path: Path) -> None:
    images = np.zeros((300, 1, 8, 8), dtype=np.float32)
    images[7, 0, 1, 1] = np.nan
    np.save(tmp_path / "a.npy", images)
    code, _, err = command("finetune", "digits", "--steps", 2, "--out", tmp_path / "run", "--data", tmp_path / "a.npy")
    assert code == 2
    assert "1 of 300 images hold NaN or infinity" in err
    assert not (tmp_path / "run").exists()


def test_every_option_reaches_the_run(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "few.toml").write_text("evaluate_count = 16\n")
    code, _, err = command(
        "finetune", "digits", "--steps", 1, "--out", run, "--config", tmp_path / "few.toml", "--iterations", 1,
        "--batch-size", 8, "--flip",
        "--holdout-fraction", 0.2, "--features", "pixels,digits-conv", "--balance", "equal", "--no-feature-cache",
        "--resize", "stretch", "--crop", "0,0,8,8",
    )  # fmt: skip
    assert code == 0, err
    assert "mmd-export: measuring the untuned sampler\n" in err
    settings = json.loads((run / "settings.json").read_text())["settings"]
    given = {
        "flip": True, "holdout_fraction": 0.2, "features": ["pixels", "digits-conv"], "balance": "equal",
        "resize": "stretch", "crop": [0, 0, 8, 8], "holdout": ["digits-mlp"],
    }  # fmt: skip
    assert given.items() <= settings.items()
    assert "feature_cache" not in settings


def test_help_names_every_kind_of_encoder_and_loads_no_torch() -> None:
    script = (
        "import sys\nfrom mmd_export.cli import app\n"
        "try:\n    app(['finetune', '--help'])\nfinally:\n"
        "    sys.stderr.write(str(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    text = "".join(done.stdout.replace("│", " ").split())
    for form in encoder_forms():
        assert form.partition(":")[0] in text
