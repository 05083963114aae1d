"""Several held-out encoders and held-out images: who decides, what is reported, what a resume refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file

from mmd_export.checkpoints.folder_card import stated_lineage
from mmd_export.errors import UsageError
from mmd_finetune.data import DataOptions, load_real
from mmd_finetune.digits import load_digits_split
from mmd_finetune.loop import tune
from mmd_finetune.metrics import frechet_distance
from mmd_finetune.reference import encode_in_batches
from mmd_finetune.run_folder import RunResult
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.task import prepare
from tests.finetune.runs import changed, distance_of, log_of
from tests.finetune.vision_models import save_vision_model


def test_the_first_held_out_encoder_decides_and_all_are_reported(
    tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    one = tune(changed(tiny_settings, features=("digits-conv",), holdout=("digits-mlp", "pixels")))
    other = tune(
        changed(tiny_settings, features=("digits-conv",), holdout=("pixels", "digits-mlp"), out=tmp_path / "other")
    )
    assert one.held_out.keys() == other.held_out.keys() == {"digits-mlp", "pixels"}
    assert (one.held_out_before, one.held_out_after) == one.held_out["digits-mlp"]
    assert (other.held_out_before, other.held_out_after) == other.held_out["pixels"]
    for result, decides in ((one, "digits-mlp"), (other, "pixels")):
        measured = [line for line in log_of(result.folder) if "held_out" in line]
        assert all(set(line["held_out_by_encoder"]) == {"digits-mlp", "pixels"} for line in measured)
        assert all(line["held_out"] == line["held_out_by_encoder"][decides] for line in measured)
        assert all(next(iter(line["intervals"])) == decides for line in measured)
        best = min(measured, key=lambda line: line["held_out"])
        assert result.best_iteration == best["iteration"]
        card = (result.folder / "README.md").read_text()
        for name, values in result.held_out.items():
            for value, (low, high), told in zip(
                values, result.held_out_intervals[name], result.told[name], strict=True
            ):
                assert low is not None
                assert high is not None
                assert low < value < high
                assert told == f"{value:.2f} ({low:.2f} to {high:.2f})"
            assert f"| `{name}` | {' | '.join(result.told[name])} |" in card
        assert "base_model:" not in card  # that of a folder is none for the hub


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (1.0, ("2.55 (1.66 to 3.51)", "0.54 (0.19 to 0.85)")),
        (0.1, ("0.26 (0.17 to 0.35)", "0.0544 (0.0191 to 0.0853)")),
        (1e-3, ("0.00255 (0.00166 to 0.00351)", "0.000544 (0.000191 to 0.000853)")),
        (0.0, ("0.00 (0.00 to 0.00)", "0.00 (0.00 to 0.00)")),
    ],
)
def test_a_small_scale_of_an_encoder_hides_no_result(scale: float, told: tuple[str, str], tmp_path: Path) -> None:
    before, after = (2.551, 1.661, 3.511), (0.5441, 0.1911, 0.8531)
    (first, low, high), (last, least, most) = ([scale * each for each in side] for side in (before, after))
    result = RunResult(
        folder=tmp_path,
        iterations=1,
        best_iteration=1,
        held_out_before=first,
        held_out_after=last,
        held_out={"pixels": (first, last)},
        seconds=1.0,
        held_out_intervals={"pixels": ((low, high), (least, most))},
    )
    assert result.told == {"pixels": told}


def test_a_finished_run_gives_the_same_result(tiny_settings: FinetuneSettings) -> None:
    settings = changed(tiny_settings, features=("digits-conv",), holdout="digits-mlp,pixels")
    assert tune(settings) == tune(settings, resume=True)


def test_a_result_of_an_earlier_release_has_no_intervals(tiny_settings: FinetuneSettings) -> None:
    result = tune(changed(tiny_settings, iterations=1))
    file = result.folder / "result.json"
    values = json.loads(file.read_text())
    del values["held_out_intervals"]
    file.write_text(json.dumps(values))
    again = tune(changed(tiny_settings, iterations=1), resume=True)
    assert again.told == {"digits-mlp": (f"{result.held_out_before:.2f}", f"{result.held_out_after:.2f}")}


def test_held_out_images_are_not_in_the_loss(tiny_settings: FinetuneSettings) -> None:
    work = prepare(changed(tiny_settings, holdout_fraction=0.25))
    split = load_real("digits", DataOptions(holdout_fraction=0.25), (1, 8, 8))
    assert 250 < len(split.held_out) < 470
    assert len(split.train) + len(split.held_out) == len(load_digits_split().train_images)
    for reference in work.references:
        assert len(reference.features) == len(split.train)
    images, held_out = torch.from_numpy(split.train[:50]), torch.from_numpy(split.held_out)
    expected = frechet_distance(work.holdout(images), encode_in_batches(work.holdout, held_out))
    assert distance_of(work, images) == pytest.approx(expected)


def test_the_batch_must_fit_the_training_part(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match=r"images for a batch of 1437; bring more or lower --batch-size"):
        prepare(changed(tiny_settings, holdout_fraction=0.1, batch_size=1437))
    prepare(changed(tiny_settings, batch_size=1437))


def test_files_as_encoders_in_a_whole_run(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    save_vision_model("clip", tmp_path / "models/clip")
    save_vision_model("dinov2", tmp_path / "models/dino")
    features, holdout = f"clip:{tmp_path}/models/clip,digits-conv", f"dino:{tmp_path}/models/dino,digits-mlp"
    result = tune(changed(tiny_settings, features=features, holdout=holdout, iterations=2))
    assert set(log_of(result.folder)[-1]["losses"]) == {"clip:clip", "digits-conv"}
    assert set(result.held_out) == {"dino:dino", "digits-mlp"}
    for name in ("README.md", "settings.json", "result.json", "log.jsonl"):
        assert str(tmp_path) not in (result.folder / name).read_text()


def test_the_card_of_a_tuned_hub_model_names_its_base(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_settings.model
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: folder)
    settings = changed(tiny_settings, model="somebody/tiny", iterations=1)
    run = tune(settings).folder
    assert (metadata_load(run / "README.md") or {})["base_model"] == "somebody/tiny"
    assert "base model: `somebody/tiny`, SHA-256" in (run / "README.md").read_text()
    assert stated_lineage(run)["base model"].startswith("`somebody/tiny`, SHA-256 ")
    copy = changed(settings, model=str(Path(folder).parent / "copies" / "tiny"))  # the same weights on a disk
    shutil.copytree(folder, copy.model)
    assert tune(copy, resume=True).folder == run


def test_a_resume_with_other_weights_in_the_encoder_file_is_refused(
    tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    save_vision_model("dinov2", tmp_path / "dino")
    settings = changed(tiny_settings, holdout=f"dino:{tmp_path}/dino", iterations=1)
    tune(settings)
    path = tmp_path / "dino/model.safetensors"
    weights = load_file(path)
    weights["layernorm.bias"] += 1.0
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"sha256 of encoder dino:dino was '[0-9a-f]{64}', is now '[0-9a-f]{64}'"):
        tune(settings, resume=True)


def test_one_encoder_under_two_spellings_cannot_be_held_out(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path / "dino")
    settings = changed(
        tiny_settings, features=f"dino:{tmp_path}/dino", holdout=f"dino:{tmp_path}/../{tmp_path.name}/dino"
    )
    with pytest.raises(UsageError, match="2 encoders are called dino:dino"):
        prepare(settings)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"features": "clip:/no/where"}, r"clip:/no/where does not exist"),
        ({"holdout": "inception:/no/where.pth"}, "the file does not exist"),
        ({"holdout": "torchscript:/no/where.pt,digits-mlp"}, "the file does not exist"),
        ({"holdout_fraction": 1e-9}, "0 of 1437 images are held out"),
        ({"data": "hf:/no/where"}, "/no/where does not exist"),
        ({"crop": (0, 0, 9, 8)}, "digits, image 0 is 8 x 8, --crop 0,0,9,8"),
    ],
)
def test_bad_input_leaves_nothing(values: dict[str, Any], said: str, tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match=said):
        tune(changed(tiny_settings, **values))
    assert not tiny_settings.out.exists()


def test_data_of_another_size_is_resized_on_demand(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    large = np.repeat(np.repeat(load_digits_split().train_images[:64], 2, axis=2), 2, axis=3)
    np.save(tmp_path / "large.npy", large)
    settings = changed(tiny_settings, data=str(tmp_path / "large.npy"), iterations=1)
    with pytest.raises(UsageError, match=r"images are \(1, 16, 16\), the model makes \(1, 8, 8\).*--resize crop"):
        prepare(settings)
    assert len(prepare(changed(settings, resize="crop", flip=True)).references[0].features) == 128
