"""A noisy 10-step sampler on a quadratic grid, tuned against an integral probability metric.

Fan and Lee 2023 (arXiv 2301.13362) tune DDPM samplers so that they need not follow the reverse diffusion any more. Here
the metric is the MMD, and its gradient goes through all steps, noise included (reparametrised); theirs is a learned
critic with policy gradients.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from docs.examples.common import Sibling, arguments, count_of, draw, finish
from mmd_export.plan_options import PlanOptions
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings

STEPS, ITERATIONS, RATE = 10, 40, 2e-4


def quadratic_grid(steps: int, last: int = 999) -> tuple[int, ...]:
    """t_i = round(last (i / (K - 1))^2), descending; Song et al. 2021, appendix D.3, up to its constant."""
    return tuple(round(last * (i / (steps - 1)) ** 2) for i in reversed(range(steps)))


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Tune, build, verify and draw; everything is left in ``out``."""
    started = time.perf_counter()
    plan = PlanOptions(timesteps=quadratic_grid(STEPS), eta=1.0)
    tune(
        FinetuneSettings(
            model="digits",
            out=out / "run",
            learning_rate=RATE,
            iterations=2 if quick else ITERATIONS,
            batch_size=8 if quick else 96,
            evaluate_count=16 if quick else 512,
            **plan.wanted,
        )
    )
    before = {"digits, the same noisy steps": draw("digits", count_of(quick=quick), **plan.wanted)}
    sibling = Sibling(str(out / "run"), PlanOptions(), before, "tuned with the MMD")
    return finish(sibling, out, quick=quick, started=started)


if __name__ == "__main__":
    given = arguments(__doc__)
    print(run(given.out, quick=given.quick))
