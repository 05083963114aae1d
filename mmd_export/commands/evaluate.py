"""``mmd-export evaluate``: samples against real images, on any encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmd_export.commands.sample import SampleOptions, sample
from mmd_finetune.data import load_images
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder, require_fit
from mmd_finetune.metrics import class_histogram, frechet_distance


def evaluate(
    options: SampleOptions, data: str, encoders: tuple[str, ...], notify: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Frechet distance per encoder and, where it classifies, the share of each class.

    ``data`` digits means all 1,797 scans here, since nothing is trained.
    """
    networks = {name: load_encoder(name) for name in encoders}
    real = load_digits_split().all_images if data == "digits" else load_images(data)
    notify(f"drawing {options.count} samples")
    drawn = sample(options)
    if drawn.dtype == np.uint8:
        drawn = (drawn.transpose(0, 3, 1, 2).astype(np.float32) / 127.5) - 1.0
    images, truth = torch.from_numpy(np.ascontiguousarray(drawn)), torch.from_numpy(real)
    for network in networks.values():
        require_fit(network, (images.shape[1], images.shape[2], images.shape[3]))
    with torch.inference_mode():
        distances = {name: frechet_distance(encode(images), encode(truth)) for name, encode in networks.items()}
        shares = {name: class_histogram(encode, images) for name, encode in networks.items()}
    return {
        "source": options.source.rstrip("/").rsplit("/", 1)[-1], "count": options.count, "seed": options.seed,
        "real_images": len(real), "frechet_distance": distances, "class_shares": shares,
    }  # fmt: skip
