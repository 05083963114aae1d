"""Draw the weights of the encoder ``random-conv`` into ``finetune/mmd_finetune/encoders/random-conv.safetensors``.

They are shipped because the last bits of torch's normal numbers depend on the CPU, and the encoder's SHA-256 on them:
where they differ, this script makes another encoder.
"""

from __future__ import annotations

import math

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmd_finetune.encoders.random_conv import WEIGHTS, RandomConv

SEED = 1


def drawn() -> dict[str, Tensor]:
    """Convolutions normal with the variance 2 / fan-in (He et al. 2015); norms as they begin, 1 and 0."""
    generator = torch.Generator().manual_seed(SEED)
    weights = RandomConv().state_dict()
    for name, weight in weights.items():
        if weight.dim() == 4:
            spread = math.sqrt(2.0 / weight[0].numel())
            weights[name] = spread * torch.randn(weight.shape, generator=generator)
    return weights


if __name__ == "__main__":
    save_file(drawn(), WEIGHTS)
    print(f"{WEIGHTS.name} written")
