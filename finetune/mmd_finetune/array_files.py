"""Images in .npz, .npy and IDX files."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import UsageError

ARRAYS = (".npz", ".npy")
Pixels = NDArray[np.uint8] | NDArray[np.float32]
GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 8


def read_array(path: Path) -> NDArray[np.generic]:
    """The array of an .npy file, or the one called ``images`` or the only one of an .npz file."""
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


def is_idx(path: Path) -> bool:
    """By name: ``...-ubyte`` or ``...idx3...``, with or without ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith((".idx", "ubyte")) or "idx3" in name


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The bytes of an IDX file: 0, 0, type, number of axes, each length as big-endian uint32, then the values.

    The format of MNIST: LeCun, Cortes and Burges, yann.lecun.com/exdb/mnist.
    """
    try:
        data = path.read_bytes()
        if data.startswith(GZIP):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data {path} cannot be read: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE or data[3] not in (3, 4):
        raise UsageError(
            f"--data {path}: it starts with {data[:4].hex() or 'nothing'}, an IDX file of images starts with "
            "00000803 or 00000804"
        )
    axes = data[3]
    lengths = np.frombuffer(data, dtype=">u4", count=min(axes, len(data) // 4 - 1), offset=4)
    shape = tuple(int(length) for length in lengths)
    values = np.frombuffer(data[4 + 4 * axes :], dtype=np.uint8)
    if len(shape) != axes or len(values) != math.prod(shape):
        raise UsageError(
            f"--data {path}: the header says {shape}, that is {math.prod(shape)} bytes, {len(values)} follow; copy it "
            "again"
        )
    return values.reshape(shape).copy()


def from_array(array: NDArray[np.generic], name: str) -> Pixels:
    """Images (N, C, H, W) of an array NHW, NHWC or NCHW, channels 1 or 3: bytes as they are, floats as float32.

    Raises UsageError for NaN, infinity, floats outside [-1, 1], and floats of which none is below 0.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif not (array.ndim == 4 and array.shape[1] in (1, 3)):
        raise UsageError(
            f"--data {name}: the array is {array.shape}; NHW, NHWC or NCHW with 1 or 3 channels is expected"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array, dtype=np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"--data {name}: the array is {array.dtype}; uint8 or floats in [-1, 1] are expected")
    images = np.ascontiguousarray(array.astype(np.float32))
    if len(bad := np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))):
        raise UsageError(
            f"--data {name}: {len(bad)} of {len(images)} images hold NaN or infinity, the first is number {bad[0]} "
            "counted from 0"
        )
    low, high = (images.min(), images.max()) if images.size else (-1.0, 1.0)
    wrong = f"--data {name}: values run from {low:g} to {high:g}"
    if low < -1.0 or high > 1.0:
        raise UsageError(f"{wrong}; [-1, 1] is expected")
    if low >= 0.0 and high > 0.0:
        raise UsageError(
            f"{wrong}, none is below 0, as in images of [0, 1]; [-1, 1] is expected: save 2 x - 1, or bytes"
        )
    return images


def as_floats(pixels: Pixels) -> NDArray[np.float32]:
    """float32 in [-1, 1]: bytes v become v / 127.5 - 1."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return pixels.astype(np.float32, copy=False)


def as_bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """The nearest bytes."""
    return pixels if pixels.dtype == np.uint8 else np.rint((pixels + 1.0) * 127.5).astype(np.uint8)  # type: ignore[return-value]
