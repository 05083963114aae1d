"""What the MMD is made of: kernel x estimator x reference x batch, on the built-in digits at 5 steps.

Writes ``benchmarks/results/mmd_ablation.json`` cell by cell; a run that was stopped goes on. ``--kernels`` (all but
``polynomial``, which without a degree is ``cubic``), ``--estimators``, ``--references`` and ``--batches`` take any
value that the settings of ``finetune`` take; all else is ``finetune/configs/digits.toml``. Every cell draws the same
number of images while it tunes, so a larger batch means fewer iterations. Measured as in ``digits_budgets``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.budgets import tuned
from benchmarks.cells import CellFile, digest
from benchmarks.common import RESULTS, ROOT
from benchmarks.digits_budgets import DRAWS, ruler
from mmd_export.checkpoint import load_checkpoint
from mmd_finetune.kernels import KERNELS
from mmd_finetune.settings import FinetuneSettings, make_settings

CONFIG = ROOT / "finetune/configs/digits.toml"
# The settings that these two are set by; "default" leaves out an axis that the settings do not have.
ESTIMATOR, REFERENCE, DEFAULT = "estimator", "reference", "default"
BATCHES = (64, 256, 1024)


def axis(name: str) -> list[str]:
    """Every value that the setting ``name`` may have, by its annotation; "default" where there is no such setting."""
    field = FinetuneSettings.model_fields.get(name)
    return (
        [DEFAULT]
        if field is None
        else [str(value) for value in getattr(field.annotation, "__args__", (field.default,))]
    )


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key of each cell and its settings beyond the config."""
    whole = make_settings({"out": "unused"}, CONFIG)
    drawn = whole.iterations * whole.batch_size
    middle = (whole.batch_size, whole.reference, whole.estimator, whole.kernel)
    axes = (arguments.batches, arguments.references, arguments.estimators, arguments.kernels)
    crossed = [each for each in product(*axes) if arguments.design == "full" or differing(each, middle) <= 1]
    for seed, (batch, reference, estimator, kernel) in product(arguments.seeds, crossed):
        iterations = max(1, drawn // batch)
        values = {
            "kernel": kernel, ESTIMATOR: estimator, REFERENCE: reference, "batch_size": batch, "seed": seed,
            "iterations": iterations, "evaluate_every": max(1, iterations // 8),
        }  # fmt: skip
        yield (
            f"{kernel}/{estimator}/{reference}/{batch}/{seed}",
            {name: value for name, value in values.items() if value != DEFAULT},
        )


def differing(values: Sequence[object], others: Sequence[object]) -> int:
    """In how many places two lists differ; what is no setting counts as the same."""
    return sum(value not in (other, DEFAULT) for value, other in zip(values, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--design", choices=("star", "full"), default="star")
    parser.add_argument("--kernels", nargs="+", default=sorted(KERNELS.keys() - {"polynomial"}))
    parser.add_argument("--estimators", nargs="+", default=axis(ESTIMATOR))
    parser.add_argument("--references", nargs="+", default=axis(REFERENCE))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/mmd_ablation", help="run folders, to go on from")
    parser.add_argument("--out", type=Path, default=RESULTS / "mmd_ablation.json")
    arguments = parser.parse_args()
    scans, base = ruler(), load_checkpoint("digits").sha256
    file = CellFile(arguments.out, "benchmarks/mmd_ablation.py", {"draws": DRAWS, "samples_a_draw": scans.count})
    for key, values in cells(arguments):
        given = {**values, "device": arguments.device, "out": arguments.runs}
        public = {**make_settings(given, CONFIG).public(), "base_sha256": base}
        place = arguments.runs / f"{key.replace('/', '-')}-{digest(public)}"
        file.measure(key, public, tuned(make_settings({**given, "out": place}, CONFIG), scans))


if __name__ == "__main__":
    main()
