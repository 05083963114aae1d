"""``evaluate`` on bundles and models: every metric with its interval, and refusals that name both values."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmd_export.checkpoint import BUILT_IN
from mmd_export.commands import evaluate as commands
from mmd_export.commands.evaluate import Scoring, evaluate
from mmd_export.commands.sample import SampleOptions, draw
from mmd_export.errors import UsageError
from mmd_finetune.data import DataOptions, load_real
from mmd_finetune.metrics.suite import METRICS
from tests.cli.conftest import Command


def scored(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command("evaluate", *arguments, "--json", "-")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def test_a_bundle_on_both_encoders(command: Command, digits_bundle: Path) -> None:
    result = scored(command, digits_bundle, "--count", 128, "--bootstrap", 40)
    assert set(result["metrics"]) == {"digits-conv", "digits-mlp"}
    assert sum(result["class_shares"]["digits-mlp"]) == pytest.approx(1.0)
    found = result["metrics"]["digits-mlp"]["frechet"]
    assert found["low"] < found["value"] < found["high"]


class Detached(nn.Module):
    """Scores, and lets no gradient through."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)


def test_an_encoder_that_only_scores_needs_no_gradient(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    torch.jit.script(Detached()).save(str(tmp_path / "scorer.pt"))
    features = f"torchscript:{tmp_path / 'scorer.pt'}"
    result = scored(command, digits_bundle, "--count", 128, "--bootstrap", 0, "--features", features)
    (found,) = result["metrics"].values()
    assert found["frechet"]["value"] > 0.0


def test_every_metric_in_a_table_with_a_picture(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "deep" / "values.png"
    code, out, err = command(
        "evaluate", digits_bundle, "--features", "digits-mlp,pixels", "--metrics", ",".join(METRICS), "--count", 300,
        "--bootstrap", 40, "--plot", plot,
    )  # fmt: skip
    assert code == 0, err
    for name in METRICS:
        assert sum(line.split()[1:2] == [name] for line in out.splitlines()) == 2
    with Image.open(plot) as picture:
        assert picture.size[0] > 1000
    assert "drawing" in err
    assert "drawn in onnxruntime: onnxruntime" in err


def test_the_same_seed_in_every_runtime_scores_the_same(command: Command, digits_bundle: Path) -> None:
    # 300 images: more than one part for the model, whole batches for the graph
    shared = ("--count", 300, "--features", "digits-mlp", "--metrics", "frechet,kid", "--bootstrap", 0)
    graph = scored(command, digits_bundle, *shared, "--runtime", "onnxruntime")
    model = scored(command, "digits", "--steps", 2, *shared)
    assert graph["runtime"].startswith("onnxruntime: ")
    assert model["runtime"].startswith("torch: ")
    for name in ("frechet", "kid"):
        value = model["metrics"]["digits-mlp"][name]
        assert value["low"] is None
        assert graph["metrics"]["digits-mlp"][name]["value"] == pytest.approx(value["value"], rel=1e-3)
    other = scored(command, "digits", "--steps", 2, *shared, "--seed", 2)
    assert other["metrics"]["digits-mlp"]["frechet"] != model["metrics"]["digits-mlp"]["frechet"]


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """40 random grey images of 8x8."""
    place = tmp_path / "grey.npz"
    np.savez(place, images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    return place


def test_other_data_and_fewer_real_images(command: Command, grey: Path) -> None:
    shared = ("digits", "--steps", 2, "--data", grey, "--count", 20, "--features", "pixels")
    assert scored(command, *shared)["real_images"] == 40
    assert scored(command, *shared, "--real-count", 30)["real_images"] == 30
    kept = scored(command, *shared, "--metrics", "memorisation", "--held-out-data", grey)
    assert kept["held_out_images"] == 40


@pytest.mark.parametrize(("real_count", "encoded"), [(None, 40 + 40), (30, 30 + 40 + 40)])
def test_training_images_are_encoded_once(grey: Path, real_count: int | None, encoded: int) -> None:
    """Real and held out; the training images apart only where fewer real ones are compared."""
    scoring = Scoring(
        str(grey), ("pixels",), ("memorisation",), resamples=0, real_count=real_count, held_out_data=str(grey)
    )
    seen: list[tuple[str, int, int]] = []
    evaluate(SampleOptions("digits", steps=2, count=20), scoring, lambda *progress: seen.append(progress))
    told = {what: (done, of) for what, done, of in seen}
    assert told["pixels: features"] == (20, 20)
    assert told["pixels: features of real images"] == (encoded, encoded)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--metrics", "fid"), "metric 'fid' is unknown; known: frechet, kid"),
        (("--metrics", ""), "metrics are none; name at least one"),
        (
            ("--features", "digits-mlp,digits-mlp"),
            "2 encoders are called digits-mlp; name each once, or rename one of the files",
        ),
        (
            ("--bootstrap", -1),
            "--bootstrap is -1; give 0, or at least 40: an interval of 95 % leaves 2.5 % at each end",
        ),
        (("--bootstrap", 39), "--bootstrap is 39; give 0, or at least 40"),
        (("--real-count", 0), "--real-count is 0"),
        (("--count", 1), "1 samples and 1797 real images"),
        (("--metrics", "recall", "--neighbours", 16), "--neighbours is 16, there are 16 samples and 1797 real images"),
        (("--real-count", 1798), "--real-count is 1798, --data digits holds 1797 images"),
    ],
)
def test_refusals(command: Command, given: tuple[object, ...], told: str) -> None:
    code, out, err = command(
        "evaluate", "digits", "--steps", 1, *(("--count", 16) if "--count" not in given else ()), *given
    )
    assert (code, out) == (2, "")
    assert told in err


def test_a_metric_that_is_undefined_is_null_and_the_others_stay(command: Command, tmp_path: Path) -> None:
    shared = ("evaluate", "digits", "--steps", 1, "--count", 16, "--features", "digits-mlp", "--bootstrap", 40)
    measured = ("--metrics", "frechet,copying", "--plot", tmp_path / "values.png")
    code, out, err = command(*shared, *measured, "--json", tmp_path / "values.json")
    assert code == 0, err
    assert "mmd-export: warning: digits-mlp: copying: 360 held-out and 16 generated images leave no cell of 10" in err
    assert any(line.split() == ["digits-mlp", "copying", "undefined", "0"] for line in out.splitlines())
    found = json.loads((tmp_path / "values.json").read_text())["metrics"]["digits-mlp"]
    assert found["copying"] == {"value": None, "low": None, "high": None}
    assert found["frechet"]["low"] < found["frechet"]["value"]
    assert (tmp_path / "values.png").is_file()


def test_samples_of_the_noise_of_the_run_are_warned_of(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(BUILT_IN["digits"], run)
    (run / "settings.json").write_text(json.dumps({"settings": {"seed": 1}}))
    shared = ("evaluate", run, "--steps", 1, "--count", 4, "--features", "digits-mlp", "--bootstrap", 0)
    told = f"warning: {run} was tuned on the noise of seed 1; give another --seed for samples that it has not seen"
    assert told in command(*shared)[2]
    assert "warning" not in command(*shared, "--seed", 2)[2]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder of 40 grey pictures of 12x10."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (40, 10, 12), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{row:02}.png")
    return folder


def test_a_folder_is_prepared_and_split_as_finetune_does(command: Command, large: Path) -> None:
    prepared = ("--resize", "crop", "--crop", "1,0,10,10", "--flip", "--holdout-fraction", 0.3)
    result = scored(
        command, "digits", "--steps", 1, "--count", 20, "--features", "pixels", "--bootstrap", 0, "--data", large,
        *prepared, "--metrics", "memorisation",
    )  # fmt: skip
    parts = load_real(str(large), DataOptions("crop", (1, 0, 10, 10), True, 0.3), (1, 8, 8))
    assert result["held_out_images"] == len(parts.held_out)
    assert result["real_images"] == len(parts.train) + len(parts.held_out) == 80 - len(parts.held_out)
    assert result["preparation"] == {
        "resize": "crop", "crop": [1, 0, 10, 10], "flip": True, "holdout_fraction": 0.3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--resize", "squash"), "--resize is 'squash': input should be 'crop' or 'stretch'"),
        (("--crop", "1,2,3"), "--crop '1,2,3' is not LEFT,TOP,WIDTH,HEIGHT, four whole numbers"),
        (("--flip",), "--data digits has its size and its split; leave --resize, --crop, --flip"),
        (("--holdout-fraction", 1), "--holdout-fraction is 1.0: input should be less than 1"),
        (("--holdout-fraction", 0.5, "--held-out-data", "digits"), "both say which images are held out; give one"),
        (("--features", "digits-mlp", "--data", "large"), "images are (1, 10, 12), digits makes (1, 8, 8)"),
        (("--data", "large"), "pass --resize crop or stretch"),
        (
            ("--data", "large", "--resize", "crop", "--holdout-fraction", 0.7, "--metrics", "memorisation"),
            "memorisation: 30 held-out images, 10 training images; hold out fewer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    command: Command, large: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[object, ...], told: str
) -> None:
    monkeypatch.setattr(commands._Run, "drawn", lambda *_: pytest.fail("it was drawn"))
    places = [large if each == "large" else each for each in given]
    code, _, err = command("evaluate", "digits", "--steps", 1, "--count", 16, *places)
    assert code == 2
    assert told in err
    assert err.startswith("mmd-export: error")


def test_no_tf32_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def refuse(*_: object) -> None:
        seen.extend((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise UsageError("far enough")

    monkeypatch.setattr(commands, "draw", refuse)
    with pytest.raises(UsageError, match="far enough"):
        evaluate(SampleOptions("digits", steps=1), Scoring())
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32  # torch's default


def test_an_encoder_that_does_not_fit_is_refused_before_anything_is_drawn(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands._Run, "drawn", lambda *_: pytest.fail("it was drawn"))
    torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())).save(str(tmp_path / "colour.pt"))
    features = f"torchscript:{tmp_path / 'colour.pt'}"
    code, _, err = command("evaluate", "digits", "--steps", 1, "--count", 16, "--features", features)
    assert code == 2
    assert "encoder torchscript:colour.pt: on 2 images (1, 8, 8) it fails" in err


def test_data_that_does_not_fit_is_refused(command: Command, grey: Path, tmp_path: Path) -> None:
    shared = ("evaluate", "digits", "--steps", 1, "--count", 16, "--features", "pixels")
    code, _, err = command(*shared, "--data", grey, "--metrics", "memorisation")
    assert code == 2
    assert f"memorisation: images outside --data {grey} are needed; give --held-out-data or --holdout-fraction" in err
    np.savez(tmp_path / "large.npz", images=np.zeros((20, 16, 16), dtype=np.uint8))
    code, _, err = command(*shared, "--data", tmp_path / "large.npz")
    assert code == 2
    assert "images are (1, 16, 16), digits makes (1, 8, 8)" in err
    code, _, err = command(
        *shared, "--data", grey, "--metrics", "memorisation", "--held-out-data", tmp_path / "large.npz"
    )
    assert code == 2
    assert "large.npz: images are (1, 16, 16), digits makes (1, 8, 8)" in err


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_model_is_drawn_on_the_device_that_is_named(name: str, command: Command, tmp_path: Path) -> None:
    out = () if name == "evaluate" else ("--out", tmp_path / "grid.png")
    count = ("--count", 4, "--steps", 1)
    code, _, err = command(name, "digits", *count, *out, "--device", "cpu")
    assert code == 0, err
    assert "CPU" in err.splitlines()[-1]
    assert re.search(r"drawing .* 4/4 ", err)
    code, _, err = command(name, "digits", *count, *out, "--device", "tpu")
    assert (code, "--device is 'tpu'; give auto, cpu, cuda or cuda:NUMBER" in err) == (2, True)
    if not torch.cuda.is_available():
        code, _, err = command(name, "digits", *count, *out, "--device", "cuda:0")
        assert (code, "device cuda:0: no NVIDIA GPU is visible to torch; use --device cpu" in err) == (3, True)


def test_a_bundle_has_a_runtime_and_no_device(command: Command, digits_bundle: Path) -> None:
    code, _, err = command("evaluate", digits_bundle, "--device", "cpu")
    assert code == 2
    assert f"--device cpu goes with a model, {digits_bundle} is a bundle; choose a --runtime" in err


def test_some_rows_are_those_of_all(digits_bundle: Path) -> None:
    for options in (SampleOptions(str(digits_bundle), 3, 9), SampleOptions("digits", 3, 9, steps=1, device="cpu")):
        some, whole = draw(options, range(4, 9)).images(), draw(options).images()
        np.testing.assert_allclose(some, whole[4:], atol=1e-5)
        assert list(draw(options, range(4, 4)).parts) == []
