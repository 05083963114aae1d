"""A convolutional network of random weights: it knows no class, so it sees what classifiers learn to ignore."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from mmd_finetune.encoder import Encoder, Family, shipped
from mmd_finetune.encoder_source import Source

WEIGHTS = Path(__file__).with_name("random-conv.safetensors")
WIDTHS = (32, 64, 96)
POSITIONS = 2  # along each side, of the last map's means


class RandomConv(nn.Module):
    """Images (N, 1 or 3, H, W), H and W at least 2, to the last map's means over quarters, (N, 384).

    Weights are normal with the variance 2 / fan-in (He et al. 2015), biases zero, drawn once by
    ``finetune/recipes/draw_random_conv.py``; until they are loaded the convolutions hold anything. Naeem et al. 2020
    (arXiv 2002.09797) measure with such an embedding where no trained one fits the data.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            # Default weights would be drawn from the global generator, which is the caller's.
            conv = skip_init(nn.Conv2d, inner, outer, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(8, outer), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)
        return F.adaptive_avg_pool2d(self.layers(colour), POSITIONS).flatten(1)


def _load(source: Source) -> Encoder:
    return shipped(source.kind, RandomConv(), WEIGHTS, "install again", channels=(1, 3))


FAMILY = Family(("random-conv",), "", _load)
