"""Noise from a seed: Philox4x32-10 -> Box-Muller in float64 -> float32, the same on every device.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 generators). Specification, also
on one page with test vectors in ``docs/noise.md``:

    key      = (seed mod 2**32, seed >> 32)                        0 <= seed < 2**64
    counter  = (block, stream, image, 0)                           block b holds values 4b .. 4b+3 in C order
    u(w)     = (w + 0.5) * 2**-32                                  never 0, never 1
    z0, z1   = r cos t, r sin t   with r = sqrt(-2 ln u(w0)), t = 2 pi u(w1);   z2, z3 likewise from w2, w3

Stream 0 is the initial noise, stream s + 1 the noise of the s-th noisy step. ``image`` is the index of the image
under its seed, so image i of seed s is the same whatever the batch it is drawn in.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import UsageError

_WORD = 2**32
_MASK = np.uint64(_WORD - 1)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_BLOCKS_AT_ONCE = 1 << 18


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10; Salmon et al. 2011, section 3.3. Counter (N, 4), key (2,) or (N, 2), result (N, 4)."""
    c0, c1, c2, c3 = (counter[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64)
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def box_muller(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """``z0 = sqrt(-2 ln u0) cos(2 pi u1), z1 = sqrt(-2 ln u0) sin(2 pi u1)``; (N, 4) words to (N, 4) normals."""
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    r, theta = np.sqrt(-2.0 * np.log(u[:, 0::2])), 2.0 * np.pi * u[:, 1::2]
    z = np.empty(words.shape, dtype=np.float64)
    z[:, 0::2], z[:, 1::2] = r * np.cos(theta), r * np.sin(theta)
    return z


def normal(seed: int, shape: tuple[int, int, int], images: range | int, stream: int = 0) -> NDArray[np.float32]:
    """Unit normal float32 (N, C, H, W) for the images of one seed; a count n means ``range(n)``."""
    key = _key(seed)
    chosen = images if isinstance(images, range) else range(_checked("count", images, _WORD))
    for image in (chosen[0], chosen[-1]) if chosen else ():
        _checked("image index", image, _WORD)
    values = int(np.prod([_checked("dimension", size, _WORD) for size in shape]))
    blocks = -(-values // 4)
    _checked("image size", blocks, _WORD)
    result = np.empty((len(chosen), values), dtype=np.float32)
    rows = max(1, _BLOCKS_AT_ONCE // max(1, blocks))
    for row in range(0, len(chosen), rows):
        part = chosen[row : row + rows]
        for start in range(0, blocks, _BLOCKS_AT_ONCE):
            stop = min(start + _BLOCKS_AT_ONCE, blocks)
            z = box_muller(philox4x32(_counters(start, stop, _checked("stream", stream, _WORD), part), key))
            result[row : row + rows, 4 * start : 4 * stop] = z.reshape(len(part), -1)[:, : values - 4 * start]
    return result.reshape(len(chosen), *shape)


def sampler_noise(
    seed: int, count: int, shape: tuple[int, int, int], noisy_steps: int, first: int = 0
) -> dict[str, NDArray[np.float32]]:
    """A sampler's inputs: ``noise`` (N, C, H, W) and, if there are noisy steps, ``step_noise`` (S, N, C, H, W)."""
    start, size = _checked("first image", first, _WORD), _checked("count", count, _WORD)
    images = range(start, start + size)
    inputs = {"noise": normal(seed, shape, images)}
    if _checked("number of noisy steps", noisy_steps, _WORD) > 0:
        inputs["step_noise"] = np.stack([normal(seed, shape, images, stream=s + 1) for s in range(noisy_steps)])
    return inputs


def _key(seed: int) -> NDArray[np.uint32]:
    """The seed's low and high 32 bits."""
    whole = _checked("seed", seed, 2**64)
    return np.array([whole % _WORD, whole >> 32], dtype=np.uint32)


def _counters(start: int, stop: int, stream: int, images: range) -> NDArray[np.uint32]:
    """Counters (block, stream, image, 0) for blocks start .. stop - 1 of every image, image by image."""
    counters = np.zeros((len(images), stop - start, 4), dtype=np.uint32)
    counters[:, :, 0] = np.arange(start, stop, dtype=np.uint64).astype(np.uint32)
    counters[:, :, 1] = stream
    counters[:, :, 2] = np.array(images, dtype=np.uint64).astype(np.uint32)[:, None]
    return counters.reshape(-1, 4)


def _checked(what: str, value: Any, limit: int) -> int:
    """The value as an int in 0 .. limit - 1."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} is {value!r}, not a whole number; give one from 0 to {limit - 1}") from None
    if not 0 <= whole < limit:
        raise UsageError(f"{what} is {whole}, the generator takes 0 to {limit - 1}; give one in that range")
    return whole
