"""Features on disk: by data and encoder, whole or computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmd_finetune import feature_cache
from mmd_finetune.encoder import Encoder
from mmd_finetune.feature_cache import FeatureCache, feature_folder
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings


class Counting(nn.Module):
    """The pixels, and how many images passed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) * 2.0


def encoder() -> tuple[Encoder, Counting]:
    network = Counting()
    return Encoder("counting", network, sha256="ab" * 32), network


IMAGES = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_the_second_time_nothing_is_computed(tmp_path: Path) -> None:
    made, network = encoder()
    first = FeatureCache(tmp_path)(made, IMAGES)
    second = FeatureCache(tmp_path)(made, IMAGES)
    assert network.seen == 5
    assert torch.equal(first, second)
    assert torch.equal(first, IMAGES.flatten(1) * 2.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda made, images: (replace(made, sha256="cd" * 32), images),
        lambda made, images: (made, images + 0.5),
        lambda made, images: (made, images.flip(0)),
        lambda made, images: (made, images.reshape(5, 4, 1, 1)),
    ],
)
def test_another_encoder_or_other_data_is_another_entry(
    change: Callable[[Encoder, Tensor], tuple[Encoder, Tensor]], tmp_path: Path
) -> None:
    made, network = encoder()
    FeatureCache(tmp_path)(made, IMAGES)
    FeatureCache(tmp_path)(*change(made, IMAGES))
    assert network.seen == 10
    assert len(list(tmp_path.iterdir())) == 2


def test_another_number_of_images_at_once_is_another_entry(tmp_path: Path) -> None:
    """It changes the rounding, and a run that goes on must find the numbers that it began with."""
    made, _ = encoder()
    for batch in (2, 3, 2):
        FeatureCache(tmp_path, batch=batch)(made, IMAGES)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("made", [Encoder("unknown", Counting()), encoder()[0]])
def test_no_folder_or_no_hash_keeps_nothing(made: Encoder, tmp_path: Path) -> None:
    FeatureCache(tmp_path if not made.sha256 else None)(made, IMAGES)
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def other_rows(path: Path) -> None:
    features = load_file(path)["features"][:3]
    save_file({"features": features}, path, {"sha256": feature_cache.hash_images(features)})


def other_content(path: Path) -> None:
    save_file({"rows": torch.zeros(5, 4)}, path)


@pytest.mark.parametrize("damage", [cut, garbage, flipped_bit, other_rows, other_content])
def test_a_damaged_file_is_computed_again_with_a_warning(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, network = encoder()
    right = FeatureCache(tmp_path)(made, IMAGES)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert torch.equal(FeatureCache(tmp_path)(made, IMAGES), right)
    assert network.seen == 10
    assert str(path) in caplog.text
    assert "computing the features again" in caplog.text
    caplog.clear()
    assert torch.equal(FeatureCache(tmp_path)(made, IMAGES), right)  # mended
    assert (network.seen, caplog.text) == (10, "")


def test_a_disk_that_refuses_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    made, _ = encoder()
    assert torch.equal(FeatureCache(tmp_path / "file" / "cache")(made, IMAGES), IMAGES.flatten(1) * 2.0)
    assert "cannot be written" in caplog.text


def test_a_write_that_fails_midway_leaves_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    made, _ = encoder()
    FeatureCache(tmp_path)(made, IMAGES)
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_run_uses_the_cache_and_changes_no_number(
    tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMD_EXPORT_CACHE", str(tmp_path / "cache"))
    assert feature_folder() == tmp_path / "cache" / "features"

    def logged(name: str, *, cache: bool) -> list[str]:
        run = tmp_path / name
        tune(tiny_settings.model_copy(update={"out": run, "iterations": 1, "feature_cache": cache}))
        return [line.split('"seconds"')[0] for line in (run / "log.jsonl").read_text().splitlines()]

    without = logged("without", cache=False)
    assert not feature_folder().exists()
    assert logged("cold", cache=True) == without
    assert len(list(feature_folder().iterdir())) == 3  # two encoders of the loss, one held out
    assert logged("warm", cache=True) == without
