"""IDX files, nested folders, Hugging Face datasets, resizing, mirror images, and the split by hash."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmd_export.errors import NotAvailableError, UsageError
from mmd_finetune.data import DataOptions, held_out_rows, load_images, load_real
from mmd_finetune.digits import load_digits_split
from mmd_finetune.pictures import files_under

BYTES = np.random.default_rng(0).integers(0, 256, size=(6, 8, 6), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, size=(6, 8, 6, 3), dtype=np.uint8)


def floats(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    batch = pixels[..., None] if pixels.ndim == 3 else pixels
    return (batch.astype(np.float64) / 127.5 - 1.0).transpose(0, 3, 1, 2).astype(np.float32)


def idx(pixels: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{pixels.ndim}I", 0, 8, pixels.ndim, *pixels.shape) + pixels.tobytes()


# ----------------------------------------------------------------------------------------------------------------- IDX
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images.idx3-ubyte.gz", "mine.idx"])
@pytest.mark.parametrize("pixels", [BYTES, COLOUR])
def test_idx(name: str, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    data = idx(pixels)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    np.testing.assert_allclose(load_images(str(tmp_path / name)), floats(pixels), atol=1e-6)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "starts with nothing, an IDX file of images starts with 00000803"),
        (idx(BYTES)[:3], "starts with 000008,"),
        (struct.pack(">HBBI", 0, 8, 1, 6) + b"labels", "starts with 00000801"),
        (struct.pack(">HBB3I", 0, 13, 3, 1, 1, 1) + b"abcd", "starts with 00000d03"),
        (idx(BYTES)[:-5], r"the header says \(6, 8, 6\), that is 288 bytes, 283 follow"),
        (idx(BYTES) + b"more", r"288 bytes, 292 follow"),
        (idx(BYTES)[:9], r"the header says \(6,\)"),
        (gzip.compress(idx(BYTES), mtime=0)[:40], "cannot be read"),
        (b"\x1f\x8bgarbage", "cannot be read"),
    ],
)
def test_damaged_idx_says_both_values(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a-ubyte").write_bytes(data)
    with pytest.raises(UsageError, match=said):
        load_images(str(tmp_path / "a-ubyte"))


# ------------------------------------------------------------------------------------------------------------- folders
def write(folder: Path, pictures: dict[str, NDArray[np.uint8]]) -> None:
    for name, pixels in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


def test_folders_in_folders_are_read_in_the_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path, {"b/0.png": COLOUR[1], "a/1.png": COLOUR[0], "c.png": COLOUR[2], ".trash/9.png": COLOUR[3]})
    np.testing.assert_allclose(load_images(str(tmp_path)), floats(COLOUR[:3]), atol=1e-6)


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    """Classes that lie on another disk, a link to a folder beside it, and links that lead in circles."""
    write(tmp_path / "elsewhere", {"cats/0.png": COLOUR[0], "cats/.hidden.png": COLOUR[5], "dogs/1.png": COLOUR[1]})
    write(tmp_path / "data", {"z/2.png": COLOUR[2]})
    (tmp_path / "elsewhere/dogs/again").symlink_to(tmp_path / "data", target_is_directory=True)
    for name, goal in (("a", "../elsewhere/cats"), ("b", "../elsewhere/dogs"), ("c", "z"), ("z/up", "..")):
        (tmp_path / "data" / name).symlink_to(goal, target_is_directory=True)
    assert sorted(map(str, files_under(tmp_path / "data"))) == ["a/0.png", "b/1.png", "z/2.png"]
    np.testing.assert_allclose(load_images(str(tmp_path / "data")), floats(COLOUR[:3]), atol=1e-6)
    (tmp_path / "link").symlink_to("data", target_is_directory=True)
    np.testing.assert_allclose(load_images(str(tmp_path / "link")), floats(COLOUR[:3]), atol=1e-6)


def test_grey_pictures_among_coloured_ones(tmp_path: Path) -> None:
    write(tmp_path, {"0.png": COLOUR[0], "1.png": BYTES[1]})
    with pytest.raises(UsageError, match=r"1\.png is \(8, 6, 1\), 0\.png is \(8, 6, 3\)"):
        load_images(str(tmp_path))
    images = load_images(str(tmp_path), shape=(3, 8, 6))
    np.testing.assert_allclose(images[1], np.repeat(floats(BYTES[1:2])[0], 3, axis=0), atol=1e-6)


def test_mixed_sizes_are_named_or_resized(tmp_path: Path) -> None:
    write(tmp_path, {"0.png": COLOUR[0], "1.png": np.tile(COLOUR[1], (3, 2, 1))})
    with pytest.raises(UsageError, match=r"1\.png is \(24, 12, 3\), 0\.png is \(8, 6, 3\).*pass --resize"):
        load_images(str(tmp_path), shape=(3, 8, 6))
    for way in ("crop", "stretch"):
        images = load_images(str(tmp_path), DataOptions(resize=way), (3, 8, 6))
        assert images.shape == (2, 3, 8, 6)
        np.testing.assert_allclose(images[0], floats(COLOUR[:1])[0], atol=1e-6)  # of the right size: untouched


def halves(height: int = 8, width: int = 16) -> NDArray[np.uint8]:
    """Black, grey, grey, white from left to right."""
    row = np.repeat(np.array([0, 128, 128, 255], dtype=np.uint8), width // 4)
    return np.tile(row, (height, 1))


def test_crop_keeps_the_middle_and_stretch_keeps_all(tmp_path: Path) -> None:
    write(tmp_path, {"0.png": halves()})
    cropped = load_images(str(tmp_path), DataOptions(resize="crop"), (1, 4, 4))
    stretched = load_images(str(tmp_path), DataOptions(resize="stretch"), (1, 4, 4))
    middle = 128 / 127.5 - 1
    np.testing.assert_allclose(cropped, middle, atol=0.1)  # the filter sees a little of what is beside
    assert stretched[0, 0, 0, 0] < -0.9
    assert stretched[0, 0, 0, 3] > 0.9


def test_arrays_are_resized_as_pictures_are(tmp_path: Path) -> None:
    smooth = np.rint(127.5 + 100 * np.sin(np.arange(64).reshape(1, 8, 8) / 9)).astype(np.uint8)
    np.save(tmp_path / "a.npy", smooth)
    write(tmp_path / "pictures", {"0.png": smooth[0]})
    options = DataOptions(resize="crop")
    array, picture = (load_images(str(tmp_path / name), options, (1, 4, 4)) for name in ("a.npy", "pictures"))
    np.testing.assert_allclose(array, picture, atol=1.1 / 127.5)  # Pillow rounds pictures to bytes


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_crop_cuts_a_box_out(kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR)
    write(tmp_path / "pictures", {f"{i}.png": pixels for i, pixels in enumerate(COLOUR)})
    spec = str(tmp_path / ("a.npy" if kind == "array" else "pictures"))
    images = load_images(spec, DataOptions(crop=(1, 2, 4, 5)))
    np.testing.assert_allclose(images, floats(COLOUR[:, 2:7, 1:5]), atol=1e-6)
    for box in ((0, 0, 7, 8), (-1, 0, 2, 2), (0, 0, 0, 3), (5, 0, 2, 2)):
        with pytest.raises(UsageError, match="is 6 x 8, --crop"):
            load_images(spec, DataOptions(crop=box))


def test_a_picture_that_is_too_large_to_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    write(tmp_path, {"0.png": COLOUR[0]})
    with pytest.raises(UsageError, match=r"picture .*0\.png cannot be read"):
        load_images(str(tmp_path))


# ------------------------------------------------------------------------------------------------ Hugging Face datasets
def dataset(pixels: NDArray[np.uint8], column: str = "image") -> Any:
    import datasets

    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.fromarray(each) for each in pixels]
    return datasets.Dataset.from_dict({column: pictures, "label": list(range(len(pixels)))}, features=features)


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps arrow files of what it loads; not in the home of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


def test_one_split_saved_to_disk(tmp_path: Path) -> None:
    dataset(COLOUR).save_to_disk(tmp_path / "saved")
    for spec in (f"hf:{tmp_path}/saved", str(tmp_path / "saved")):
        np.testing.assert_allclose(load_images(spec), floats(COLOUR), atol=1e-6)
    with pytest.raises(UsageError, match="split=train is asked for, the folder holds one split without a name"):
        load_images(f"hf:{tmp_path}/saved?split=train")


def test_splits_and_columns(tmp_path: Path) -> None:
    import datasets

    splits = datasets.DatasetDict({"train": dataset(COLOUR[:4]), "test": dataset(COLOUR[4:])})
    splits.save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path}/saved"
    np.testing.assert_allclose(load_images(spec), floats(COLOUR[:4]), atol=1e-6)
    np.testing.assert_allclose(load_images(f"{spec}?split=test&column=image"), floats(COLOUR[4:]), atol=1e-6)
    with pytest.raises(UsageError, match="split validation does not exist; splits: train, test"):
        load_images(f"{spec}?split=validation")
    with pytest.raises(UsageError, match="column label holds no images; these do: image"):
        load_images(f"{spec}?column=label")
    with pytest.raises(UsageError, match="option rows=3 is unknown; known: split, column, name, revision"):
        load_images(f"{spec}?rows=3")


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    dataset(BYTES, "img").to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    np.testing.assert_allclose(load_images(str(tmp_path / "hub")), floats(BYTES), atol=1e-6)


@pytest.mark.parametrize("place", ["features.parquet", "00000.parquet", "train/deep/rows.parquet"])
def test_pictures_are_read_whatever_parquet_lies_beside_them(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = {"00000/0.png": COLOUR[0], "extra/1.png": COLOUR[1], "test/2.png": COLOUR[2], "train/3.png": COLOUR[3]}
    write(tmp_path, pictures)
    (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
    dataset(COLOUR[4:]).to_parquet(tmp_path / place)
    np.testing.assert_allclose(load_images(str(tmp_path)), floats(COLOUR[:4]), atol=1e-6)
    assert f"its pictures are read; for its parquet files say --data hf:{tmp_path}" in caplog.text


def test_the_parquet_of_a_folder_with_pictures_is_read_on_demand(tmp_path: Path) -> None:
    write(tmp_path, {"assets/logo.png": COLOUR[0]})
    (tmp_path / "data").mkdir()
    dataset(COLOUR[1:]).to_parquet(tmp_path / "data/train.parquet")
    np.testing.assert_allclose(load_images(str(tmp_path)), floats(COLOUR[:1]), atol=1e-6)
    np.testing.assert_allclose(load_images(f"hf:{tmp_path}"), floats(COLOUR[1:]), atol=1e-6)


def test_a_configuration_is_chosen_by_name(tmp_path: Path) -> None:
    for name, pixels in (("small", COLOUR[:2]), ("large", COLOUR)):
        (tmp_path / "hub" / name).mkdir(parents=True)
        dataset(pixels).to_parquet(tmp_path / "hub" / name / "train.parquet")
    names = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{names}---\n")
    for name, pixels in (("small", COLOUR[:2]), ("large", COLOUR)):
        np.testing.assert_allclose(load_images(f"hf:{tmp_path}/hub?name={name}"), floats(pixels), atol=1e-6)
    with pytest.raises(UsageError, match="Config name is missing"):
        load_images(f"hf:{tmp_path}/hub")
    with pytest.raises(UsageError, match="revision=main is asked for, a folder has none; leave it out"):
        load_images(f"hf:{tmp_path}/hub?name=small&revision=main")
    dataset(COLOUR).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="name=small is asked for, what save_to_disk wrote has none; leave it out"):
        load_images(f"hf:{tmp_path}/saved?name=small")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_picture_is_upright_in_a_folder_as_in_a_dataset(suffix: str, tmp_path: Path) -> None:
    """Orientation 6, as a phone held upright writes it: the stored rows are the columns, from right to left."""
    import datasets

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    path = tmp_path / f"pictures/0{suffix}"
    Image.fromarray(np.rot90(COLOUR[0])).save(path, exif=exif, lossless=True)
    images = load_images(str(tmp_path / "pictures"))
    assert images.shape == (1, 3, 8, 6)
    if suffix != ".jpg":
        np.testing.assert_allclose(images, floats(COLOUR[:1]), atol=1e-6)
    rows = {"image": [str(path)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    other = load_images(str(tmp_path / "saved"))
    assert np.array_equal(images, other)
    assert np.array_equal(held_out_rows(images, 0.5), held_out_rows(other, 0.5))


@pytest.mark.parametrize("exif", [b"II*\0\x08", b"XX*\0"])
def test_a_picture_with_damaged_exif_is_read_as_it_is_stored(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(COLOUR[0]).save(tmp_path / "0.png", exif=b"Exif\0\0" + exif)
    np.testing.assert_allclose(load_images(str(tmp_path)), floats(COLOUR[:1]), atol=1e-6)


def test_datasets_are_resized_too(tmp_path: Path) -> None:
    dataset(COLOUR).save_to_disk(tmp_path / "saved")
    assert load_images(f"hf:{tmp_path}/saved", DataOptions(resize="crop"), (3, 4, 4)).shape == (6, 3, 4, 4)


def no_column(folder: Path) -> None:
    dataset(COLOUR).remove_columns(["image"]).save_to_disk(folder)


def empty_row(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [Image.fromarray(COLOUR[0]), None]}, features=features).save_to_disk(folder)


def cut_image(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": b"\x89PNG cut", "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(folder)


def cut_arrow(folder: Path) -> None:
    dataset(COLOUR).save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_column, r"columns of images are none; say \?column=NAME"),
        (empty_row, "row 1 has no image"),
        (cut_image, "the image of row 0 cannot be read"),
        (cut_arrow, "datasets cannot load it"),
    ],
)
def test_what_a_dataset_lacks_is_named(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "saved")
    with pytest.raises(UsageError, match=said):
        load_images(f"hf:{tmp_path}/saved")


@pytest.mark.parametrize("place", ["/no/where", "./nowhere", "nowhere"])
def test_a_path_is_never_looked_for_on_the_hub(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(UsageError, match="does not exist; a folder, or a hub id owner/name"):
        load_images(f"hf:{place}")


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def load(place: str, **chosen: str) -> Any:
        asked.append((place, chosen))
        return {"train": dataset(COLOUR)}

    monkeypatch.setattr("datasets.load_dataset", load)
    np.testing.assert_allclose(load_images("hf:somebody/pictures"), floats(COLOUR), atol=1e-6)
    load_images("hf:somebody/pictures?name=large&revision=v1.0&split=train")
    assert asked == [
        ("somebody/pictures", {}),
        ("somebody/pictures", {"name": "large", "revision": "v1.0"}),
    ]

    monkeypatch.setattr("datasets.load_dataset", lambda _: {"train": dataset(COLOUR[:0])})
    with pytest.raises(UsageError, match="the split has no rows"):
        load_images("hf:somebody/nothing")

    def refuse(_: str) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(NotAvailableError, match="datasets cannot load it: no route to host"):
        load_images("hf:somebody/pictures")


# ---------------------------------------------------------------------------------------------- mirror images and split
def test_mirror_images_double_the_training_part_only(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(2).integers(0, 256, size=(200, 4, 4, 3), dtype=np.uint8))
    plain, flipped = (
        load_real(str(tmp_path / "a.npy"), DataOptions(flip=flip, holdout_fraction=0.3), (3, 4, 4))
        for flip in (False, True)
    )
    count = len(plain.train)
    assert np.array_equal(flipped.train[:count], plain.train)
    assert np.array_equal(flipped.train[count:], plain.train[..., ::-1])
    assert np.array_equal(flipped.held_out, plain.held_out)


def rows_of(images: NDArray[Any]) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_the_split_is_by_content_alone() -> None:
    images = load_digits_split().train_images
    held = held_out_rows(images, 0.2)
    assert held.mean() == pytest.approx(0.2, abs=0.03)
    order = np.random.default_rng(0).permutation(len(images))
    assert np.array_equal(held_out_rows(images[order], 0.2), held[order])
    assert np.array_equal(held_out_rows(images[:100], 0.2), held[:100])
    more = held_out_rows(images, 0.4)
    assert (more | ~held).all()  # a larger fraction holds out the same images and more
    assert not held_out_rows(images, 0.0).any()


def test_duplicates_never_straddle_the_split() -> None:
    images = np.concatenate([load_digits_split().train_images[:300]] * 2)
    held = held_out_rows(images, 0.5)
    assert 0 < held.sum() < len(images)
    assert not rows_of(images[held]) & rows_of(images[~held])


def test_the_split_is_that_of_the_bytes_whatever_holds_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, size=(40, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "bytes.npy", pixels)
    np.save(tmp_path / "floats.npy", pixels.astype(np.float64) / 127.5 - 1.0)
    write(tmp_path / "pictures", {f"{i:02}.png": each for i, each in enumerate(pixels)})
    splits = [held_out_rows(load_images(str(tmp_path / name)), 0.5) for name in ("bytes.npy", "floats.npy", "pictures")]
    assert 0 < splits[0].sum() < 40
    assert np.array_equal(splits[0], splits[1])
    assert np.array_equal(splits[0], splits[2])


def test_known_answer() -> None:
    """Fixed for ever: a later version must hold out the same images."""
    images = np.array([[[[value / 127.5 - 1.0]]] for value in range(16)], dtype=np.float32)
    assert np.flatnonzero(held_out_rows(images, 0.3)).tolist() == [1, 2, 3, 8, 9, 10, 13]
