"""Real images from where they lie: the built-in digits, an array file, or a folder of pictures."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import UsageError
from mmd_finetune.digits import load_digits_split

DIGITS = "digits"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
ARRAYS = (".npz", ".npy")


def load_images(spec: str) -> NDArray[np.float32]:
    """Images float32 (N, C, H, W) in [-1, 1].

    ``digits`` is the training split of the built-in scans; else an .npz or .npy file (uint8, or floats in [-1, 1];
    NHW, NHWC or NCHW; an .npz holds the array as ``images`` or as its only one), or a folder of pictures of one size.
    Raises UsageError that names the file and what is wrong with it.
    """
    if spec == DIGITS:
        return load_digits_split().train_images
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise UsageError(
            f"--data {spec} does not exist; a folder of pictures, an .npz or .npy file, or {DIGITS} is expected"
        )
    if path.suffix.lower() not in ARRAYS:
        raise UsageError(f"--data {spec} is a {path.suffix or 'nameless kind of'} file; {', '.join(ARRAYS)} are read")
    return _from_array(_read_array(path), str(path))


def require_images(images: NDArray[np.float32], spec: str, shape: tuple[int, int, int], batch: int) -> None:
    """Raise UsageError unless the images are (C, H, W) as the model makes them, and at least ``batch`` many."""
    if images.shape[1:] != shape:
        raise UsageError(
            f"--data {spec}: images are {tuple(images.shape[1:])}, the model makes {shape} (channels, height, width)"
        )
    if len(images) < batch:
        raise UsageError(
            f"--data {spec}: {len(images)} images for a batch of {batch}; bring more or lower --batch-size"
        )


def _read_array(path: Path) -> NDArray[np.generic]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            if "images" not in names and len(names) != 1:
                raise UsageError(f"--data {path}: arrays {', '.join(names) or 'none'}; name one of them 'images'")
            array: NDArray[np.generic] = loaded["images" if "images" in names else names[0]]
            return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"--data {path} cannot be read: {error}") from error


def _from_array(array: NDArray[np.generic], name: str) -> NDArray[np.float32]:
    """uint8 or float; NHW, NHWC or NCHW, channels 1 or 3."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif not (array.ndim == 4 and array.shape[1] in (1, 3)):
        raise UsageError(
            f"--data {name}: the array is {array.shape}; NHW, NHWC or NCHW with 1 or 3 channels is expected"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array.astype(np.float32) / 127.5 - 1.0)
    if not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"--data {name}: the array is {array.dtype}; uint8 or floats in [-1, 1] are expected")
    images = np.ascontiguousarray(array.astype(np.float32))
    if bad := int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum()):
        raise UsageError(f"--data {name}: {bad} of {len(images)} images hold NaN or infinity")
    if images.size and (images.min() < -1.0 or images.max() > 1.0):
        raise UsageError(f"--data {name}: values run from {images.min():g} to {images.max():g}; [-1, 1] is expected")
    return images


def _from_folder(folder: Path) -> NDArray[np.float32]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise UsageError(f"--data {folder}: no picture lies there; {', '.join(PICTURES)} are read")
    first = _read_picture(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for row, path in enumerate(paths):
        pixels = _read_picture(path)
        if pixels.shape != first.shape:
            raise UsageError(
                f"--data {folder}: {path.name} is {pixels.shape}, {paths[0].name} is {first.shape} (height, width, "
                "channels); all pictures need one size"
            )
        images[row] = pixels
    return _from_array(images, str(folder))


def _read_picture(path: Path) -> NDArray[np.uint8]:
    """(H, W, C) with C = 1 for a grey picture and 3 for a coloured one."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise UsageError(f"--data: {path} has {picture.mode} pixels; 8 bits a channel are expected")
            converted = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
            pixels = np.asarray(converted, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"--data: picture {path} cannot be read: {error}") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
