"""Sample sheets: images side by side in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.folders import output_file

SMALLEST_TILE = 48  # pixels; an 8x8 digit is not legible below
_GAP = 2


def as_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """``round((x + 1) * 127.5)`` for float (N, C, H, W) in [-1, 1]; uint8 (N, H, W, C) as it is."""
    channel_axis = 3 if images.dtype == np.uint8 else 1
    if images.ndim != 4 or images.shape[channel_axis] not in (1, 3) or 0 in images.shape:
        known = "float (N, C, H, W) or uint8 (N, H, W, C) with 1 or 3 channels"
        raise UsageError(f"images are {images.dtype.name} {images.shape}, a picture needs {known}")
    if images.dtype == np.uint8:
        return images
    if not np.isfinite(images).all():
        raise UsageError(f"images hold {int((~np.isfinite(images)).sum())} NaN or infinite values; nothing was drawn")
    levels = np.rint((np.clip(images.astype(np.float64), -1, 1) + 1) * 127.5)
    return levels.astype(np.uint8).transpose(0, 2, 3, 1)


def grid(images: NDArray[Any], columns: int | None = None, scale: int | None = None) -> NDArray[np.uint8]:
    """One picture uint8 (height, width, C), row by row on white; ``columns`` defaults to a near-square sheet.

    Each pixel becomes ``scale`` by ``scale`` pixels; by default so many that a tile has at least 48.
    """
    pixels = as_uint8(images)
    count, height, width, channels = pixels.shape
    across = math.ceil(math.sqrt(count)) if columns is None else columns
    factor = max(1, math.ceil(SMALLEST_TILE / min(height, width))) if scale is None else scale
    if across < 1 or factor < 1:
        raise UsageError(f"{across} columns at scale {factor}; give at least 1 of each")
    across = min(across, count)
    tiles = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    high, wide = height * factor + _GAP, width * factor + _GAP
    sheet = np.full((math.ceil(count / across) * high - _GAP, across * wide - _GAP, channels), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // across * high, index % across * wide
        sheet[top : top + height * factor, left : left + width * factor] = tile
    return sheet


def save_grid(images: NDArray[Any], path: Path, columns: int | None = None, scale: int | None = None) -> None:
    """Write ``grid`` as a PNG that appears complete or not at all."""
    try:
        from PIL import Image
    except ImportError as error:
        raise NotAvailableError(f"pictures need Pillow ({error}); pip install pillow") from error
    sheet = grid(images, columns, scale)
    picture = Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet)
    with output_file(path) as file:
        picture.save(file, format="PNG")
