"""Quantisation-aware tuning on digits in 5 steps: the artefact of a lower precision, tuned in it or only built in it.

Writes ``benchmarks/results/quantisation_aware.json``, a row for each seed and precision, and goes on where it was
stopped. ``float32``: the run of ``finetune/configs/digits.toml``, built in fp32. ``built``: the same weights built in
the precision. ``tuned``: that run tuned on with ``--precision`` (``CHANGES``). Each graph runs in onnxruntime as it
ships; the distance is that of three draws of 1,797 samples pooled, to all scans, in the encoder that no loss sees.
``--runs`` may be the folder of ``benchmarks/plan_learning.py``, which has the float32 run too. About 4 minutes for a
float32 run and as long for each precision, on a quiet core.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.precision import Judge
from benchmarks.tuning_rows import Rows, digits_settings, run_folders, tuned
from mmd_export.checkpoint import load_checkpoint
from mmd_export.precision.lower import lower

PRECISIONS = ("int8", "w4", "fp8")
CHANGES: dict[str, Any] = {"iterations": 40, "learning_rate": 5e-5, "evaluate_every": 10}
DRAWS = 3
LARGEST_RATIO = 1.10
FLOAT = "fp32"


def judge_of(folder: Path) -> Judge:
    """The judge of a finished run's own plan."""
    return Judge(load_checkpoint(folder), None, DRAWS)


def float_row(seed: int, folder: Path) -> dict[str, Any]:
    """The float32 run and its artefact."""
    result, seconds = tuned(digits_settings(folder / f"all-weights-{seed}", seed))
    judge = judge_of(result.folder)
    scores = judge.score(judge.exact)
    return {"seed": seed, "precision": FLOAT, "seconds": seconds, "float32": asdict(scores)}


def row(seed: int, precision: str, folder: Path) -> dict[str, Any]:
    """The artefact of the float32 run's weights, and that of the run in the precision."""
    start = folder / f"all-weights-{seed}"
    plain = judge_of(start)
    built = plain.score(plain.sample(plain.graph(lower(plain.calls, precision))))
    values = {"model": str(start), "precision": precision, **CHANGES}
    result, seconds = tuned(digits_settings(folder / f"{precision}-{seed}", seed, **values))
    judge = judge_of(result.folder)
    record = judge.checkpoint.tuned_precision
    after = judge.score(judge.sample(judge.graph(lower(judge.calls, precision, tuned=record))))
    return {
        "seed": seed, "precision": precision, "seconds": seconds, "best_iteration": result.best_iteration,
        "built": asdict(built), "tuned": asdict(after), "emulated_by_the_run": result.held_out_after,
    }  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst ratio of a tuned artefact's distance to the float32 one's of the same seed, by precision."""
    exact = {row["seed"]: row["float32"]["distance"] for row in rows if row["precision"] == FLOAT}
    found: dict[str, Any] = {}
    for each in rows:
        if each["precision"] == FLOAT or each["seed"] not in exact:
            continue
        entry = found.setdefault(each["precision"], {"seeds": [], "worst_ratio": 0.0, "worst_ratio_built": 0.0})
        entry["seeds"].append(each["seed"])
        for name, kind in (("worst_ratio", "tuned"), ("worst_ratio_built", "built")):
            entry[name] = round(max(entry[name], each[kind]["distance"] / exact[each["seed"]]), 4)
    for entry in found.values():
        entry["reached"] = entry["worst_ratio"] <= LARGEST_RATIO
    return {"verdict": found, "largest_ratio": LARGEST_RATIO, "changes": CHANGES, "draws": DRAWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs, to go on after a stop")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantisation_aware.json")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, "benchmarks/quantisation_aware.py", ("precision", "seed"), verdict)
    with run_folders(arguments.runs) as folder:
        for seed in arguments.seeds:
            wanted = [each for each in arguments.precisions if rows.find(precision=each, seed=seed) is None]
            if wanted or rows.find(precision=FLOAT, seed=seed) is None:
                measured = float_row(seed, folder)
                if rows.find(precision=FLOAT, seed=seed) is None:
                    rows.add(measured)
            for precision in wanted:
                rows.add(row(seed, precision, folder))


if __name__ == "__main__":
    main()
