"""Encoders of CIFAR-10 images from published weights: ResNet-20, ResNet-56 and SqueezeNet 1.1, as TorchScript files.

Each takes images (N, 3, 32, 32) in [-1, 1], does its own preprocessing and gives one vector an image. The weights are
safetensors files: CIFAR ResNets under the names of akamaster/pytorch_resnet_cifar10, SqueezeNet under torchvision's.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)
SQUEEZENET_SIZE = 96


class Block(nn.Module):
    """He et al. 2016 with shortcut A: strided identity, new channels zero."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if inner == outer else (2, (outer - inner) // 2)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(inner + shortcut)


class CifarResNet(nn.Module):
    """6 n + 2 layers of 16, 32 and 64 channels; 64 features before the head ``linear``."""

    mean: Tensor
    std: Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inner if i == 0 else outer, outer) for i in range(blocks)))
            for inner, outer in pairwise(widths)
        )
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) in [-1, 1] to (N, 64)."""
        x = (images * 0.5 + 0.5 - self.mean) / self.std
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        features: Tensor = x.mean((2, 3))
        return features


class Fire(nn.Module):
    """Squeeze by 1x1, expand by 1x1 and 3x3 side by side; Iandola et al. 2016."""

    def __init__(self, inner: int, squeezed: int, outer: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inner, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, outer // 2, 1)
        self.expand3x3 = nn.Conv2d(squeezed, outer // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 without its classifier, on images enlarged to 96 pixels; 512 features."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        fires = ((64, 16, 128), (128, 16, 128), (128, 32, 256), (256, 32, 256), (256, 48, 384), (384, 48, 384),
                 (384, 64, 512), (512, 64, 512))  # fmt: skip
        made = [Fire(*sizes) for sizes in fires]
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2), *made[:2], nn.MaxPool2d(3, 2), *made[2:4],
            nn.MaxPool2d(3, 2), *made[4:],
        )  # fmt: skip
        self.register_buffer("mean", torch.tensor(CAFFE_MEAN)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, 512)."""
        size = (SQUEEZENET_SIZE, SQUEEZENET_SIZE)
        x = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        features: Tensor = self.features((x + 1.0) * 127.5 - self.mean)
        return features.mean((2, 3))


ENCODERS: dict[str, tuple[Any, str]] = {
    "resnet20": (lambda: CifarResNet(3), "cifar10_resnet20_akamaster.safetensors"),
    "resnet56": (lambda: CifarResNet(9), "cifar10_resnet56_akamaster.safetensors"),
    "squeezenet": (SqueezeNet, "squeezenet1_1_imagenet_features_caffe.safetensors"),
}


def load(name: str, weights: Path) -> nn.Module:
    """One of ``ENCODERS``, every tensor of its file in place."""
    make, file = ENCODERS[name]
    network: nn.Module = make()
    found = network.load_state_dict(load_file(weights / file), strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise SystemExit(f"{file}: missing {missing}, unexpected {found.unexpected_keys}")
    return network.eval().requires_grad_(False)
