"""Particles that follow the gradient of the MMD's witness function, the gradient taken inside the graph.

The flow of Arbel et al. 2019 (arXiv 1906.04370), on which Galashov et al. 2024 (arXiv 2405.06780, DMMD) build. DMMD
learns features that depend on the noise level; here they are fixed: the pixels and the encoder digits-conv.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from docs.examples.common import Sibling, arguments, count_of, finish, scans
from mmd_export.noise import sampler_noise
from mmd_export.plan_options import PlanOptions
from mmd_finetune.features import load_encoder

CALLS, PARTICLES = 25, 512
QUICK_CALLS, QUICK_PARTICLES = 3, 32
FIRST_RATE, LAST_RATE = 15.0, 1.0
FEATURE_WEIGHT = 0.5
SOFT = 1e-2  # keeps the kernel smooth at 0
SHAPE = (1, 8, 8)
MODULE = '''"""Written by docs/examples/mmd_gradient_flow.py: the model that mmd-export reads."""

from pathlib import Path

from docs.examples.mmd_gradient_flow import load_flow


def flow():
    return load_flow(Path(__file__).with_name("flow.safetensors"))
'''


class MmdFlow(nn.Module):
    """K x rate_k x grad f_k(x), so that K Euler steps of length 1 / K go down the witness functions f_k.

        f_k(x) = mean_j k(x, p_kj) - mean_i k(x, y_i),   k(x, y) = -sqrt(|x - y|^2 + c)

    summed over two feature spaces. The y are the scans. The p_k are particles that went the same way before, all
    together, as recorded: the samples of a batch then need not know each other. Buffers: ``scans`` (N, 64), ``clouds``
    (K, M, 64), ``rates`` (K,), and the features of both.
    """

    sample_shape = SHAPE
    scans: Tensor
    scan_features: Tensor
    clouds: Tensor
    cloud_features: Tensor
    rates: Tensor

    def __init__(self, calls: int, particles: int, scan_count: int) -> None:
        super().__init__()
        self.scheduler_config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": calls}
        self.encoder: nn.Module = load_encoder("digits-conv").network
        self.register_buffer("scans", torch.zeros(scan_count, 64))
        self.register_buffer("scan_features", torch.zeros(scan_count, 64))
        self.register_buffer("clouds", torch.zeros(calls, particles, 64))
        self.register_buffer("cloud_features", torch.zeros(calls, particles, 64))
        self.register_buffer("rates", torch.zeros(calls))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The direction of one call; timestep K is the first, 1 the last."""
        calls = len(self.rates)
        k = (calls - (timestep + 0.5).long()).clamp(0, calls - 1)  # the grid is K ... 1, up to its rounding
        particle = x.detach().requires_grad_(True)
        energy = self.witness(particle, k).sum()
        (gradient,) = torch.autograd.grad(energy, particle)
        return calls * self.rates[k] * gradient

    def witness(self, x: Tensor, k: Tensor) -> Tensor:
        """f_k(x), shape (B,)."""
        pixels, features = x.flatten(1), self.encoder(x)
        return (
            mean_distance(pixels, self.scans)
            - mean_distance(pixels, self.clouds[k][0])
            + FEATURE_WEIGHT
            * (mean_distance(features, self.scan_features) - mean_distance(features, self.cloud_features[k][0]))
        )


def mean_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean over j of sqrt(|x_i - y_j|^2 + c): (B, d) and (M, d) to (B,)."""
    squared = (x * x).sum(1)[:, None] - 2.0 * x @ y.T + (y * y).sum(1)[None]
    return (squared.clamp_min(0.0) + SOFT).sqrt().mean(1)


def record_flow(calls: int, particles: int) -> MmdFlow:
    """Let ``particles`` flow from noise to the scans, each call's witness made of where they are."""
    images = scans()
    flow = MmdFlow(calls, particles, len(images))
    ramp = torch.linspace(0.0, 1.0, calls)
    flow.rates.copy_(FIRST_RATE * (LAST_RATE / FIRST_RATE) ** ramp)
    flow.scans.copy_(images.flatten(1))
    state = torch.randn(particles, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flow.scan_features.copy_(flow.encoder(images))
    for k in range(calls):
        flow.clouds[k] = state.flatten(1)
        with torch.no_grad():
            flow.cloud_features[k] = flow.encoder(state)
        state = state - flow(state, torch.tensor([calls - k])) / calls
    return flow


def save_flow(flow: MmdFlow, folder: Path) -> None:
    """``flow.safetensors`` and ``model.py``, which makes the module from it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in flow.state_dict().items()}, folder / "flow.safetensors")
    (folder / "model.py").write_text(MODULE, encoding="utf-8")


def load_flow(path: Path) -> MmdFlow:
    """The recorded flow in ``path``."""
    tensors = load_file(path)
    calls, particles, _ = tensors["clouds"].shape
    flow = MmdFlow(calls, particles, len(tensors["scans"]))
    flow.load_state_dict(tensors, strict=True)
    return flow


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Record, save as a module, build, verify and draw."""
    started = time.perf_counter()
    calls = QUICK_CALLS if quick else CALLS
    save_flow(record_flow(calls, QUICK_PARTICLES if quick else PARTICLES), out)
    noise = sampler_noise(7, count_of(quick=quick), SHAPE, 0)["noise"].clip(-1.0, 1.0)
    sibling = Sibling("python:model:flow", PlanOptions(steps=calls), {"noise": noise}, f"after {calls} calls")
    with contextlib.chdir(out):  # where python: looks for model.py
        sys.modules.pop("model", None)  # of another run in this process
        return finish(sibling, Path(), quick=quick, started=started)


if __name__ == "__main__":
    given = arguments(__doc__)
    print(run(given.out, quick=given.quick))
