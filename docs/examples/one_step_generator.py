"""A generator that calls its network once, at one fixed timestep and noise scale, as one-step distillation makes.

Flow Generator Matching (Huang et al. 2024, arXiv 2410.19310) trains such a generator against a flow-matching teacher
and an online flow. Here a generator of that form, made of the weights of digits, is trained with the MMD alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from docs.examples.common import Sibling, arguments, count_of, draw, finish
from mmd_export.plan_options import PlanOptions
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings

TIMESTEP, ITERATIONS, RATE = 440, 150, 1e-3  # sigma / alpha is 2.5 there, the scale at which EDM-style generators start
PLAN = PlanOptions(sampler="euler", timesteps=(TIMESTEP,))


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """G(z) = sqrt(sigma^2 + 1) z - sigma eps(z, t): one Euler step of k-diffusion from sigma to 0."""
    started = time.perf_counter()
    tune(
        FinetuneSettings(
            model="digits",
            out=out / "run",
            learning_rate=RATE,
            iterations=2 if quick else ITERATIONS,
            batch_size=8 if quick else 256,
            evaluate_count=16 if quick else 1024,
            **PLAN.wanted,
        )
    )
    before = {"digits, the same one call": draw("digits", count_of(quick=quick), **PLAN.wanted)}
    sibling = Sibling(str(out / "run"), PlanOptions(), before, "trained with the MMD")
    return finish(sibling, out, quick=quick, started=started)


if __name__ == "__main__":
    given = arguments(__doc__)
    print(run(given.out, quick=given.quick))
