"""The Inception v3 that FID is defined with: the graph of 2015-12-05, ported by pytorch-fid.

Szegedy et al. 2016 (arXiv 1512.00567); Heusel et al. 2017 (arXiv 1706.08500). The layout of names and widths is the one
of ``pt_inception-2015-12-05-6726825d.pth``. Two things differ from the paper's network, and the scores depend on them:
the average pools of the mixed blocks leave the padded zeros out of the mean, and the last block takes the maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
FEATURES = 2048
CLASSES = 1008
POOL = "pool"

# One line a branch: name:channels:kernel with "same" padding; a kernel 3s2 has stride 2 and no padding.
_A = (
    "branch1x1:64:1",
    "branch5x5_1:48:1 branch5x5_2:64:5",
    "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3",
    "pool branch_pool:{}:1",
)
_B = (
    "branch3x3:384:3s2",
    "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3s2",
    "pool",
)
_C = (
    "branch1x1:192:1",
    "branch7x7_1:{0}:1 branch7x7_2:{0}:1x7 branch7x7_3:192:7x1",
    "branch7x7dbl_1:{0}:1 branch7x7dbl_2:{0}:7x1 branch7x7dbl_3:{0}:1x7 branch7x7dbl_4:{0}:7x1 branch7x7dbl_5:192:1x7",
    "pool branch_pool:192:1",
)
_D = (
    "branch3x3_1:192:1 branch3x3_2:320:3s2",
    "branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3s2",
    "pool",
)
_E = (
    "branch1x1:320:1",
    "branch3x3_1:384:1 branch3x3_2a:384:1x3",
    "branch3x3_1:384:1 branch3x3_2b:384:3x1",
    "branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3",
    "branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3b:384:3x1",
    "pool branch_pool:192:1",
)
# name, input channels, branches, the number in them, kind of pool
_BLOCKS = (
    ("Mixed_5b", 192, _A, 32, "mean"),
    ("Mixed_5c", 256, _A, 64, "mean"),
    ("Mixed_5d", 288, _A, 64, "mean"),
    ("Mixed_6a", 288, _B, 0, "strided max"),
    ("Mixed_6b", 768, _C, 128, "mean"),
    ("Mixed_6c", 768, _C, 160, "mean"),
    ("Mixed_6d", 768, _C, 160, "mean"),
    ("Mixed_6e", 768, _C, 192, "mean"),
    ("Mixed_7a", 768, _D, 0, "strided max"),
    ("Mixed_7b", 1280, _E, 0, "mean"),
    ("Mixed_7c", 2048, _E, 0, "max"),
)


class FidInception(nn.Module):
    """Images (N, 3, 299, 299) in [-1, 1] to the pool3 features (N, 2048). ``fc`` is there for the state dict only."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3))
        for name, inputs, branches, number, pool in _BLOCKS:
            self.add_module(name, _Mixed(inputs, tuple(line.format(number) for line in branches), pool))
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name, *_ in _BLOCKS:
            x = self.get_submodule(name)(x)
        features: Tensor = x.mean((2, 3))
        return features


class _Conv(nn.Module):
    """Convolution without bias, batch norm with epsilon 0.001, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side; what two of them share is computed once."""

    def __init__(self, inputs: int, branches: tuple[str, ...], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.paths = tuple(tuple(part.partition(":")[0] for part in branch.split()) for branch in branches)
        for branch in branches:
            width = inputs
            for part in branch.split():
                if part != POOL:
                    name, outputs, kernel = part.split(":")
                    if name not in self._modules:
                        self.add_module(name, _conv_of(width, int(outputs), kernel))
                    width = int(outputs)

    def forward(self, x: Tensor) -> Tensor:
        done: dict[str, Tensor] = {}
        outputs = []
        for path in self.paths:
            y = x
            for name in path:
                if name not in done:
                    done[name] = pooled(y, self.pool) if name == POOL else self.get_submodule(name)(y)
                y = done[name]
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _conv_of(inputs: int, outputs: int, kernel: str) -> _Conv:
    """``3``, ``1x7`` or ``3s2``."""
    sides, _, stride = kernel.partition("s")
    height, _, width = sides.partition("x")
    size = (int(height), int(width or height))
    if stride:
        return _Conv(inputs, outputs, size, stride=int(stride))
    return _Conv(inputs, outputs, size, padding=(size[0] // 2, size[1] // 2))


def pooled(x: Tensor, kind: str) -> Tensor:
    """3 x 3: ``mean`` without the padded zeros, ``max``, or ``strided max``, which halves the size."""
    if kind == "mean":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2)


def resized_as_tensorflow(values: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear (N, C, H, W) to (N, C, side, side): row i is taken at i H / side, a pixel's corner and not its middle.

    What ``tf.image.resize_bilinear`` of TensorFlow 1 does, which stands in the original FID graph.
    """
    height, width = values.shape[2:]
    # grid_sample counts from -1 to 1 over the outer edges: pixel p of P lies at (2 p + 1) / P - 1.
    steps = torch.arange(side, device=values.device, dtype=values.dtype) / side
    rows, columns = 2.0 * steps + 1.0 / height - 1.0, 2.0 * steps + 1.0 / width - 1.0
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    return F.grid_sample(
        values, grid.expand(len(values), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
