"""A convolutional network of random weights: it knows no class, so it sees what classifiers learn to ignore."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_export.checkpoints.weights import hash_weights
from mmd_finetune.encoder import Encoder, Family, frozen
from mmd_finetune.encoder_source import Source

WIDTHS = (32, 64, 96)
POSITIONS = 2  # along each side, of the last map's means
SEED = 1


class RandomConv(nn.Module):
    """Images (N, 1 or 3, H, W), H and W at least 2, to the last map's means over quarters, (N, 384).

    Weights are normal with the variance 2 / fan-in (He et al. 2015), biases zero. Naeem et al. 2020 (arXiv 2002.09797)
    measure with such an embedding where no trained one fits the data.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            conv = nn.Conv2d(inner, outer, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            spread = math.sqrt(2.0 / (9 * inner))
            conv.weight = nn.Parameter(spread * torch.randn(conv.weight.shape, generator=generator))
            layers += [conv, nn.GroupNorm(8, outer), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)
        return F.adaptive_avg_pool2d(self.layers(colour), POSITIONS).flatten(1)


def _load(source: Source) -> Encoder:
    network = frozen(RandomConv())
    sha256 = hash_weights(dict(network.state_dict()), {"architecture": source.kind})
    return Encoder(source.kind, network, channels=(1, 3), sha256=sha256)


FAMILY = Family(("random-conv",), "", _load)
