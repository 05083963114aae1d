"""Pictures on disk: decoded, cut out, resized."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import UsageError
from mmd_finetune.array_files import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
CROP = "crop"
DECODED_AHEAD = 512
# What Pillow 12 raises on EXIF that it cannot read: https://github.com/python-pillow/Pillow/blob/main/src/PIL/TiffImagePlugin.py
DAMAGED_EXIF = (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError, struct.error)


@dataclass(frozen=True)
class Fit:
    """``crop`` is cut out first, then the picture is brought to the (C, H, W) of ``shape`` as ``resize`` says."""

    crop: tuple[int, int, int, int] | None = None
    resize: str | None = None
    shape: tuple[int, int, int] | None = None

    def picture(self, picture: Image, name: str) -> NDArray[np.uint8]:
        """(H, W, C) with C = 1 for a grey picture and 3 for a coloured one, and for a grey one if the model has 3."""
        if picture.mode.startswith(("I", "F")):
            raise UsageError(f"--data: {name} has {picture.mode} pixels; 8 bits a channel are expected")
        colour = self.shape is not None and self.shape[0] == 3
        grey = picture.mode in ("1", "L", "LA") and not colour
        pixels = np.asarray(self._fitted(picture.convert("L" if grey else "RGB"), name), dtype=np.uint8)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def array(self, images: Pixels, name: str) -> Pixels:
        """The same for images (N, C, H, W), channel by channel."""
        if self.crop is None and not self._resizes(images.shape[2:]):
            return images
        from PIL import Image

        fitted = [
            [np.asarray(self._fitted(Image.fromarray(channel), f"{name}, image {row}")) for channel in image]
            for row, image in enumerate(images)
        ]
        if images.dtype == np.uint8:
            return np.array(fitted, dtype=np.uint8)
        return np.clip(np.array(fitted, dtype=np.float32), -1.0, 1.0)  # bicubic overshoots

    def _resizes(self, size: tuple[int, ...]) -> bool:
        return self.resize is not None and self.shape is not None and size != self.shape[1:]

    def _fitted(self, picture: Image, name: str) -> Image:
        from PIL import Image, ImageOps

        if self.crop is not None:
            left, top, width, height = self.crop
            right, bottom = left + width, top + height
            if min(left, top) < 0 or min(width, height) < 1 or right > picture.width or bottom > picture.height:
                raise UsageError(
                    f"--data: {name} is {picture.width} x {picture.height}, --crop {left},{top},{width},{height} "
                    "(left, top, width, height) reaches outside"
                )
            picture = picture.crop((left, top, right, bottom))
        if not self._resizes((picture.height, picture.width)):
            return picture
        assert self.shape is not None
        size = (self.shape[2], self.shape[1])
        if self.resize == CROP:
            return ImageOps.fit(picture, size, method=Image.Resampling.BICUBIC)
        return picture.resize(size, Image.Resampling.BICUBIC)


def files_under(folder: Path) -> Iterator[Path]:
    """Paths relative to ``folder``, without hidden ones. Links to folders are followed, after the folders beside them.

    A folder is entered once, whatever leads to it: links may go in circles.
    """
    entered: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(_shown(folders), key=lambda name: (Path(place, name).is_symlink(), name))
        inside = Path(place).relative_to(folder)
        yield from (inside / name for name in _shown(files))


def _shown(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith("."))


def read_folder(folder: Path, fit: Fit) -> NDArray[np.uint8]:
    """All pictures under ``folder`` (N, H, W, C), in the order of their paths; hidden ones are left out."""
    paths = sorted(path for path in files_under(folder) if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UsageError(f"--data {folder}: no picture lies there; {', '.join(SUFFIXES)} are read")
    return stacked(_decoded(folder, paths, fit), len(paths), str(folder))


def _decoded(folder: Path, paths: Sequence[Path], fit: Fit) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and pixels in the order of ``paths``; threads decode, some pictures ahead of what was taken."""
    with ThreadPoolExecutor(thread_name_prefix="pictures") as pool:
        for first in range(0, len(paths), DECODED_AHEAD):
            some = paths[first : first + DECODED_AHEAD]
            yield from zip(map(str, some), pool.map(lambda path: read_picture(folder / path, fit), some), strict=True)


def stacked(pictures: Iterable[tuple[str, NDArray[np.uint8]]], count: int, where: str) -> NDArray[np.uint8]:
    """``count`` named pictures as one array; raises UsageError that names the first two of different sizes."""
    images = np.empty((0,), dtype=np.uint8)
    first = ""
    for row, (name, pixels) in enumerate(pictures):
        if row == 0:
            first, images = name, np.empty((count, *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise UsageError(
                f"--data {where}: {name} is {pixels.shape}, {first} is {images.shape[1:]} (height, width, "
                "channels); all pictures need one size, or pass --resize crop or stretch"
            )
        images[row] = pixels
    return images


def read_picture(path: Path, fit: Fit) -> NDArray[np.uint8]:
    """One picture (H, W, C); raises UsageError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            _turn_upright(picture)
            return fit.picture(picture, str(path))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"--data: picture {path} cannot be read: {error}; mend or remove it") from error


def _turn_upright(picture: Image) -> None:
    """As its EXIF says, and as ``datasets`` turns its images; EXIF that cannot be read leaves it as it is stored."""
    from PIL import ImageOps

    picture.load()
    with suppress(*DAMAGED_EXIF):
        ImageOps.exif_transpose(picture, in_place=True)
