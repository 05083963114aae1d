"""The multistep sampler of latent consistency models on a consistency student; Luo et al. 2023 (arXiv 2310.04378).

f(z, t) = c_skip z + c_out x0(z, t) is to be the same along a trajectory of the teacher. Here in pixels, without
guidance, on a grid of 20 timesteps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from docs.examples.common import (
    Sibling,
    arguments,
    count_of,
    draw,
    draw_batch,
    finish,
    fit,
    levels,
    save_student,
    scans,
    student_of,
    teacher,
)
from mmd_export.plan_options import PlanOptions

STEPS, GRID, ITERATIONS, QUICK_ITERATIONS = 4, 20, 500, 3
TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # LCMScheduler's own
SCHEDULER = {
    "_class_name": "LCMScheduler", "prediction_type": "v_prediction", "clip_sample": False,
    "original_inference_steps": GRID, "timestep_scaling": TIMESTEP_SCALING,
}  # fmt: skip


class Distillation:
    """Neighbours t > s on the grid, joined by one DDIM step of the teacher; s = -1 is clean data."""

    def __init__(self) -> None:
        self.checkpoint = teacher()
        gap = self.checkpoint.scheduler.num_train_timesteps // GRID
        self.grid = torch.tensor([i * gap - 1 for i in range(GRID + 1)])
        alpha, sigma = levels(self.checkpoint)
        self.alpha = torch.cat([alpha, torch.ones(1, 1, 1, 1)])
        self.sigma = torch.cat([sigma, torch.zeros(1, 1, 1, 1)])
        self.images = scans()

    def consistent(self, network: nn.Module, z: Tensor, t: Tensor) -> Tensor:
        """c_skip z + c_out (alpha z - sigma v), as LCMScheduler computes it; z itself where it is clean."""
        scaled = TIMESTEP_SCALING * t.clamp_min(0).float().reshape(-1, 1, 1, 1)
        c_skip, c_out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        value = c_skip * z + c_out * (self.alpha[t] * z - self.sigma[t] * network(z, t.clamp_min(0)))
        return torch.where(t.reshape(-1, 1, 1, 1) < 0, z, value)

    def loss(self, student: nn.Module, average: nn.Module, generator: torch.Generator) -> Tensor:
        """|f(z_t, t) - f_average(z_s, s)|^2, z_s from the teacher: consistency distillation without guidance."""
        x0, eps = draw_batch(self.images, generator)
        n = torch.randint(1, GRID + 1, (len(x0),), generator=generator)
        t, s = self.grid[n], self.grid[n - 1]
        z = self.alpha[t] * x0 + self.sigma[t] * eps
        with torch.no_grad():
            guess = self.checkpoint.denoiser(z, t)
            clean = ((z - self.sigma[t] * guess) / self.alpha[t]).clamp(-1.0, 1.0)
            target = self.consistent(average, self.alpha[s] * clean + self.sigma[s] * guess, s)
        return (self.consistent(student, z, t) - target).square().mean()


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Distil, save as a diffusers folder, build, verify and draw."""
    started = time.perf_counter()
    task = Distillation()
    student = fit(student_of(task.checkpoint), task.loss, QUICK_ITERATIONS if quick else ITERATIONS)
    folder = save_student(student, out / "student", SCHEDULER)
    before = {
        f"digits, {STEPS} steps of LCM": draw("digits", count_of(quick=quick), steps=STEPS, sampler="lcm"),
        f"digits, {STEPS} steps of DDIM": draw("digits", count_of(quick=quick), steps=STEPS),
    }
    sibling = Sibling(str(folder), PlanOptions(steps=STEPS), before, f"consistency student, {STEPS} steps of LCM")
    return finish(sibling, out, quick=quick, started=started)


if __name__ == "__main__":
    given = arguments(__doc__)
    print(run(given.out, quick=given.quick))
