"""``mmd-export demo`` as a newcomer calls it, with a few tuning iterations and fewer images and rounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmd_export.bundle import Bundle
from tests.cli.conftest import Command


@pytest.mark.slow
def test_the_whole_job_leaves_bundle_picture_and_numbers_that_agree(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmd_export.commands.demo.COUNT", 400)
    monkeypatch.setattr("mmd_export.commands.demo.BENCH_SECONDS", 2.0)
    out = tmp_path / "demo"
    code, shown, err = command("demo", "--out", out, "--iterations", 6)
    assert code == 0, err

    results = json.loads((out / "results.json").read_text())
    distances = results["held_out_frechet_distance"]
    before, after = distances["5 steps, untuned"], distances["5 steps, tuned, from the ONNX graph"]
    assert distances["10 steps, untuned"] < before
    assert after < before  # 6 iterations help already
    assert f"{before:.2f}" in shown
    assert f"{after:.2f}" in shown
    assert results["parity"]["passed"]
    assert "rungs 1 to 6 passed" in shown

    bundle = Bundle.open(out / "bundle")
    assert bundle.manifest.checkpoint.licence == "apache-2.0"
    assert "## Lineage\n\n- base model: `digits`, SHA-256" in bundle.card

    code, _, err = command("verify", out / "bundle", "--checkpoint", out / "run")
    assert code == 0, err
    picture = np.asarray(Image.open(out / "digits.png").convert("L"))
    assert picture.shape[1] > 800
    assert picture.std() > 40

    code, _, err = command("demo", "--out", out)
    assert code == 2
    assert f"{out} already exists; choose another --out or pass --overwrite" in err
