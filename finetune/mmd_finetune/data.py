"""Real images from where they lie, prepared and split: what the loss compares with, and what only scores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmd_export.errors import UsageError
from mmd_finetune.array_files import ARRAYS, Pixels, as_bytes, as_floats, from_array, is_idx, read_array, read_idx
from mmd_finetune.datasets_library import HUB, is_dataset_folder, read_dataset
from mmd_finetune.digits import load_digits_split
from mmd_finetune.pictures import Fit, read_folder

DIGITS = "digits"


@dataclass(frozen=True)
class DataOptions:
    """How images are prepared.

    Attributes:
        resize: to the model's size, by Pillow's antialiased bicubic filter (Parmar et al. 2022, arXiv 2104.11222): crop
            keeps the middle, stretch all of it. None refuses images of another size.
        crop: (left, top, width, height) cut out of every image first.
        flip: also take the mirror image of every image, which doubles their number.
        holdout_fraction: share of the images that only scores, 0 to below 1.
    """

    resize: Literal["crop", "stretch"] | None = None
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    holdout_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


AS_THEY_ARE = DataOptions()


def parse_crop(text: str) -> tuple[int, int, int, int]:
    """``left,top,width,height`` as the command line gives it; raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not LEFT,TOP,WIDTH,HEIGHT, four whole numbers")
    left, top, width, height = map(int, parts)
    return left, top, width, height


@dataclass(frozen=True)
class RealImages:
    """(N, C, H, W), bytes or float32 in [-1, 1]. ``held_out`` is ``train`` itself where nothing is held out."""

    train: Pixels
    held_out: Pixels


def load_real(spec: str, options: DataOptions, shape: tuple[int, int, int]) -> RealImages:
    """The images of ``spec`` for a model of (C, H, W), split; mirror images are added to the training part only."""
    images = _load(spec, options, shape)
    held = held_out_rows(images, options.holdout_fraction)
    train, held_out = (images, images) if not options.holdout_fraction else (images[~held], images[held])
    if options.holdout_fraction and len(held_out) < 2:
        raise UsageError(
            f"--data {spec}: {len(held_out)} of {len(images)} images are held out by --holdout-fraction "
            f"{options.holdout_fraction:g}; at least 2 are needed to score with"
        )
    if options.flip:
        train = np.concatenate([train, train[..., ::-1]])
    return RealImages(train, held_out)


def held_out_rows(images: Pixels, fraction: float) -> NDArray[np.bool_]:
    """(N,): whether an image is held out: the first 64 bits of the SHA-256 of its bytes are < fraction * 2^64.

    The content alone decides, as the model will see it: equal images stay together, order and number do not matter,
    and a larger fraction holds out the same images and more.
    """
    if not fraction:
        return np.zeros(len(images), dtype=np.bool_)
    limit = int(fraction * 2**64)
    return np.array([int.from_bytes(_digest(image)[:8], "big") < limit for image in images], dtype=np.bool_)


def _digest(image: Pixels) -> bytes:
    """Of shape and bytes, which are the same from a PNG and from an array of floats."""
    pixels = as_bytes(image)
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()


def load_images(
    spec: str, options: DataOptions = AS_THEY_ARE, shape: tuple[int, int, int] | None = None
) -> NDArray[np.float32]:
    """Images float32 (N, C, H, W) in [-1, 1].

    Args:
        spec: ``digits``, the training split of the built-in scans; an .npz or .npy file (uint8, or floats in [-1, 1];
            NHW, NHWC or NCHW; an .npz holds the array as ``images`` or as its only one); an IDX file, gzip or not; a
            folder of pictures, looked through to the bottom; a folder of Hugging Face datasets without pictures; or
            ``hf:ID_OR_FOLDER?split=NAME&column=NAME``. Only a hub id uses the network.
        options: ``resize`` and ``crop`` are followed here.
        shape: (C, H, W) of the model, which ``resize`` needs; grey pictures become colour where C is 3.

    Raises UsageError that names the file and what is wrong with it.
    """
    return as_floats(_load(spec, options, shape))


def _load(spec: str, options: DataOptions, shape: tuple[int, int, int] | None) -> Pixels:
    """The same; bytes stay bytes."""
    fit = Fit(options.crop, options.resize, shape)
    if spec == DIGITS:
        return fit.array(load_digits_split().train_images, spec)
    if spec.startswith(HUB):
        return from_array(read_dataset(spec, fit), spec)
    path = Path(spec)
    if path.is_dir():
        pictures = read_dataset(f"{HUB}{spec}", fit) if is_dataset_folder(path) else read_folder(path, fit)
        return from_array(pictures, spec)
    if not path.exists():
        raise UsageError(
            f"--data {spec} does not exist; a folder of pictures, an .npz, .npy or IDX file, {HUB}ID_OR_FOLDER, or "
            f"{DIGITS} is expected"
        )
    if is_idx(path):
        return fit.array(from_array(read_idx(path), spec), spec)
    if path.suffix.lower() not in ARRAYS:
        known = ", ".join(ARRAYS)
        raise UsageError(f"--data {spec} is a {path.suffix or 'nameless kind of'} file; {known} and IDX files are read")
    return fit.array(from_array(read_array(path), spec), spec)


def require_images(
    images: Pixels, spec: str, shape: tuple[int, int, int], batch: int, *, mirrored: bool = False
) -> None:
    """Raise UsageError unless the images are (C, H, W) as the model makes them, and at least ``batch`` many.

    ``mirrored``: half of them are mirror images, which do not count.
    """
    if images.shape[1:] != shape:
        raise UsageError(
            f"--data {spec}: images are {tuple(images.shape[1:])}, the model makes {shape} (channels, height, width)"
            + ("; pass --resize crop or stretch" if images.shape[1] == shape[0] else "")
        )
    count = len(images) // 2 if mirrored else len(images)
    if count < batch:
        raise UsageError(f"--data {spec}: {count} images for a batch of {batch}; bring more or lower --batch-size")
