"""Sample sheets: sizes, colours, order, and no half-written file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmd_export.errors import MmdExportError, UsageError
from mmd_export.pictures import as_uint8, grid, save_grid


def test_minus_one_is_black_and_one_is_white() -> None:
    images = np.array([-2, -1, 0, 1, 2, 0.5 / 127.5], np.float32).reshape(1, 1, 2, 3)
    assert as_uint8(images).reshape(-1).tolist() == [0, 0, 128, 255, 255, 128]


def test_a_small_digit_becomes_legible_without_blurring(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 48 + 2, 3 * 48 + 4)
    assert np.array_equal(pixels[3:48:6, 3:48:6], as_uint8(images)[0, :, :, 0])
    assert np.array_equal(pixels[50 + 3 :: 6, 50 + 3 : 98 : 6], as_uint8(images)[4, :, :, 0])
    assert (pixels[50:, 100:] == 255).all()


def test_colour_and_uint8_give_the_same_picture(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 64, 48)).astype(np.float32)
    save_grid(images, tmp_path / "a.png")
    save_grid(as_uint8(images), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (2 * 48 + 2, 2 * 64 + 2))


def test_scale_and_columns_can_be_chosen() -> None:
    images = np.zeros((3, 1, 4, 4), np.float32)
    assert grid(images, columns=1, scale=2).shape == (3 * 8 + 4, 8, 1)
    assert grid(images, columns=9, scale=1).shape == (4, 3 * 4 + 4, 1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 2, 4, 4), np.float32),
        np.zeros((4, 4), np.float32),
        np.zeros((0, 1, 4, 4), np.float32),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.full((1, 1, 4, 4), np.nan, np.float32),
    ],
)
def test_what_is_no_picture_is_refused(images: np.ndarray[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images"):
        save_grid(images, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_bad_columns_are_refused() -> None:
    with pytest.raises(UsageError, match="0 columns"):
        grid(np.zeros((1, 1, 4, 4), np.float32), columns=0)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((1, 1, 4, 4), np.float32)
    save_grid(images, tmp_path / "grid.png")
    before = (tmp_path / "grid.png").read_bytes()

    def full(self: Image.Image, file: Any, format: str) -> None:  # noqa: A002 - the name that Pillow gives it
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MmdExportError, match=r"cannot write .*grid.png: No space left on device"):
        save_grid(images, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]
