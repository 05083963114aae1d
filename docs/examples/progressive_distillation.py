"""A student whose one step is two steps of its teacher, predicting v; Salimans and Ho 2022 (arXiv 2202.00512).

One round, 8 steps to 4. The paper halves again and again, on a cosine schedule and from a teacher that predicts v; here
the teacher is digits as it is: linear schedule, epsilon, clean guesses clamped.
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

STEPS, ITERATIONS, QUICK_ITERATIONS = 4, 500, 3
SCHEDULER = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}


class Distillation:
    """The teacher's double steps. ``grid``: its 2 K timesteps, then -1 for clean data."""

    def __init__(self, steps: int) -> None:
        self.checkpoint = teacher()
        plan = self.checkpoint.plan_for(2 * steps, spacing="trailing")
        self.grid = torch.tensor([*map(int, plan.timesteps), -1])
        alpha, sigma = levels(self.checkpoint)
        self.alpha = torch.cat([alpha, torch.ones(1, 1, 1, 1)])  # place -1 is clean data
        self.sigma = torch.cat([sigma, torch.zeros(1, 1, 1, 1)])
        self.images, self.steps = scans(), steps

    def ddim(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The teacher's step from t to s, its clean guess clamped: alpha_s x0 + sigma_s eps."""
        eps = self.checkpoint.denoiser(z, t)
        x0 = ((z - self.sigma[t] * eps) / self.alpha[t]).clamp(-1.0, 1.0)
        there: Tensor = self.alpha[s] * x0 + self.sigma[s] * eps
        return there

    def goal(self, z: Tensor, k: Tensor) -> Tensor:
        """Where the teacher's two steps of the student's step k lead."""
        t, middle, s = (self.grid[2 * k + i] for i in range(3))
        with torch.no_grad():
            return self.ddim(self.ddim(z, t, middle), middle, s)

    def target(self, z: Tensor, k: Tensor) -> Tensor:
        """The v with which one DDIM step of the student leads there too; algorithm 2.

        x0~ = (z_s - r z_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t, and v~ = (alpha_t z_t - x0~) / sigma_t.
        """
        t, s = self.grid[2 * k], self.grid[2 * k + 2]
        ratio = self.sigma[s] / self.sigma[t]
        clean = (self.goal(z, k) - ratio * z) / (self.alpha[s] - ratio * self.alpha[t])
        return (self.alpha[t] * z - clean) / self.sigma[t]

    def loss(self, student: nn.Module, _average: nn.Module, generator: torch.Generator) -> Tensor:
        """|v - v~|^2 on noised scans, every step equally often."""
        x0, eps = draw_batch(self.images, generator)
        k = torch.randint(self.steps, (len(x0),), generator=generator)
        t = self.grid[2 * k]
        z = self.alpha[t] * x0 + self.sigma[t] * eps
        error: Tensor = (student(z, t) - self.target(z, k)).square().mean()
        return error


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Distil, save as a diffusers folder, build, verify and draw."""
    started = time.perf_counter()
    task = Distillation(STEPS)
    student = fit(student_of(task.checkpoint), task.loss, QUICK_ITERATIONS if quick else ITERATIONS)
    folder = save_student(student, out / "student", SCHEDULER)
    count = count_of(quick=quick)
    before = {
        f"digits, {2 * STEPS} steps (the teacher)": draw("digits", count, steps=2 * STEPS, spacing="trailing"),
        f"digits, {STEPS} steps": draw("digits", count, steps=STEPS, spacing="trailing"),
    }
    sibling = Sibling(str(folder), PlanOptions(steps=STEPS), before, f"student, {STEPS} steps")
    return finish(sibling, out, quick=quick, started=started)


if __name__ == "__main__":
    given = arguments(__doc__)
    print(run(given.out, quick=given.quick))
