"""The built-in data set: scikit-learn's 1,797 scans of handwritten digits (Alpaydin and Kaynak, UCI 1998), 8x8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 20230107


@dataclass(frozen=True)
class DigitsSplit:
    """Images float32 (N, 1, 8, 8) in [-1, 1] and labels int64 (N,), in a fixed stratified split."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    held_out_images: NDArray[np.float32]
    held_out_labels: NDArray[np.int64]

    @property
    def all_images(self) -> NDArray[np.float32]:
        """All 1,797 scans, training images first."""
        return np.concatenate([self.train_images, self.held_out_images])


def load_digits_split() -> DigitsSplit:
    """The 1,797 scans, 80 % to train on and 20 % held out; the same split on every machine."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    labels = data.target.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT_FRACTION, random_state=SPLIT_SEED, stratify=labels
    )
    return DigitsSplit(images[train], labels[train], images[held_out], labels[held_out])
