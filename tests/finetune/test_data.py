"""Reading real images, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmd_export.errors import UsageError
from mmd_finetune.data import load_images, require_images
from mmd_finetune.digits import load_digits_split

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, size=(5, 6, 4, 3), dtype=np.uint8)


def expected(
    pixels: NDArray[np.uint8],
) -> NDArray[np.float32]:
    return (pixels.astype(np.float64) / 127.5 - 1.0).transpose(0, 3, 1, 2).astype(np.float32)


def test_digits_are_the_training_split() -> None:
    images = load_images("digits")
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == np.float32
    assert np.array_equal(images, load_digits_split().train_images)


def test_bytes_from_npy_and_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES)
    np.savez(tmp_path / "one.npz", BYTES)
    np.savez(tmp_path / "two.npz", labels=np.arange(5), images=BYTES)
    for name in ("a.npy", "one.npz", "two.npz"):
        np.testing.assert_allclose(load_images(str(tmp_path / name)), expected(BYTES), atol=1e-6)


def test_grey_bytes_without_a_channel(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES[..., 0])
    np.testing.assert_allclose(load_images(str(tmp_path / "a.npy")), expected(BYTES[..., :1]), atol=1e-6)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(layout: str, dtype: type, tmp_path: Path) -> None:
    images: NDArray[np.generic] = GENERATOR.uniform(-1, 1, size=(5, 3, 6, 4)).astype(dtype)
    np.save(tmp_path / "a.npy", images if layout == "NCHW" else images.transpose(0, 2, 3, 1))
    loaded = load_images(str(tmp_path / "a.npy"))
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, images.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_in_the_order_of_names(channels: int, tmp_path: Path) -> None:
    for row in (3, 0, 4, 1, 2):
        pixels = BYTES[row, :, :, 0] if channels == 1 else BYTES[row]
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    np.testing.assert_allclose(load_images(str(tmp_path)), expected(BYTES[..., :channels]), atol=1e-6)


def array(tmp_path: Path, values: NDArray[np.generic]) -> str:
    np.save(tmp_path / "a.npy", values)
    return str(tmp_path / "a.npy")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data .*nowhere does not exist"):
        load_images(str(tmp_path / "nowhere"))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"data\.csv is a \.csv file; \.npz, \.npy and IDX files are read"):
        load_images(str(tmp_path / "data.csv"))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"PK\x03\x04 cut"])
def test_damaged_array_names_the_file(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{name} cannot be read"):
        load_images(str(tmp_path / name))


def test_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"a\.npy cannot be read"):
        load_images(str(tmp_path / "a.npy"))


def test_several_unnamed_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=BYTES, y=BYTES)
    with pytest.raises(UsageError, match="arrays x, y; name one of them 'images'"):
        load_images(str(tmp_path / "a.npz"))


def test_nan(tmp_path: Path) -> None:
    images = np.zeros((5, 1, 6, 4))
    images[2, 0, 1, 1] = np.nan
    with pytest.raises(UsageError, match="1 of 5 images hold NaN or infinity, the first is number 2"):
        load_images(array(tmp_path, images))


def test_range_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"values run from 0 to 255; \[-1, 1\] is expected"):
        load_images(array(tmp_path, np.linspace(0, 255, 48).reshape(2, 1, 6, 4)))


def test_floats_of_0_to_1_are_found(tmp_path: Path) -> None:
    """As torchvision and most papers keep images; taken as [-1, 1] they would be without black."""
    images = np.linspace(0, 1, 48).reshape(2, 1, 6, 4)
    with pytest.raises(UsageError, match=r"values run from 0 to 1, none is below 0, .*: save 2 x - 1, or bytes"):
        load_images(array(tmp_path, images))
    assert load_images(array(tmp_path, 2 * images - 1)).min() == -1.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, 6, 4, 1), dtype=np.int32), "the array is int32"),
        (np.zeros((6, 4), dtype=np.uint8), r"the array is \(6, 4\)"),
        (np.zeros((2, 6, 4, 2), dtype=np.uint8), r"the array is \(2, 6, 4, 2\)"),
    ],
)
def test_other_arrays(values: NDArray[np.generic], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        load_images(array(tmp_path, values))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no picture lies there"):
        load_images(str(tmp_path))


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    Image.fromarray(BYTES[0]).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(UsageError, match=r"1\.png cannot be read"):
        load_images(str(tmp_path))


def test_mixed_sizes_name_both(tmp_path: Path) -> None:
    Image.fromarray(BYTES[0]).save(tmp_path / "0.png")
    Image.fromarray(BYTES[1, :5]).save(tmp_path / "1.png")
    with pytest.raises(UsageError, match=r"1\.png is \(5, 4, 3\), 0\.png is \(6, 4, 3\)"):
        load_images(str(tmp_path))


def test_deep_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(BYTES[0, :, :, 0].astype(np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match="8 bits a channel are expected"):
        load_images(str(tmp_path))


def test_shape_of_the_model() -> None:
    images = np.zeros((4, 1, 8, 8), dtype=np.float32)
    require_images(images, "digits", (1, 8, 8), 4)
    with pytest.raises(UsageError, match=r"images are \(1, 8, 8\), the model makes \(3, 32, 32\)"):
        require_images(images, "digits", (3, 32, 32), 4)


def test_fewer_images_than_the_batch() -> None:
    with pytest.raises(UsageError, match="4 images for a batch of 5"):
        require_images(np.zeros((4, 1, 8, 8), dtype=np.float32), "digits", (1, 8, 8), 5)
    with pytest.raises(UsageError, match="2 images for a batch of 3"):
        require_images(np.zeros((4, 1, 8, 8), dtype=np.float32), "digits", (1, 8, 8), 3, mirrored=True)
