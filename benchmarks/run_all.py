"""Every benchmark that needs no GPU, one after the other; over 2 hours on 2 quiet cores, 3 GB of disk.

With ``--long`` the tuning studies too, days in all. They go on where they were stopped, and measure what is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPTS = (
    "benchmarks.schedulers",
    "benchmarks.artefacts",
    "benchmarks.forms",
    "benchmarks.speed",
    "benchmarks.winograd",
    "benchmarks.openvino",
    "benchmarks.coreml",
    "benchmarks.targets --again",
    "benchmarks.engines",
    "benchmarks.torch_targets",
    "benchmarks.digits_quality",
    "benchmarks.finetune_speed",
    "benchmarks.precision",
    "benchmarks.autocast",
    "benchmarks.guidance",
    "benchmarks.half_ends",
    "benchmarks.steep_plans",
    "benchmarks.verify_time",
    "benchmarks.fault_injection",
    "benchmarks.distribution_rung",
    "benchmarks.bisection",
    "benchmarks.latency_gate",
    "benchmarks.example",
    "benchmarks.siblings",
    "benchmarks.cpp_kit",
    "benchmarks.web_kit",
    "benchmarks.ray_kit",
    "benchmarks.optimum_pipeline",
    "benchmarks.large_model",
)
TABLES = "benchmarks.tables"

FASHION, FASHION_BASE = "benchmarks.fashion", ROOT / "runs/fashion/training.json"
# What each costs on 2 quiet cores.
LONG = {
    "benchmarks.quantisation_aware": "4 minutes for each of 4 runs a seed",
    "benchmarks.plan_learning": "4 to 6 minutes for each of 7 runs a seed",
    "benchmarks.mmd_ablation": "4 minutes and more for each of 11 runs a seed",
    "benchmarks.digits_budgets": "20 minutes on one core for each of 42 runs",
    FASHION: "24 runs, meant for a GPU; finetune/recipes/train_fashion.py comes first",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="the tuning studies too")
    long = parser.parse_args().long
    asked = [script for script in LONG if long and (script != FASHION or FASHION_BASE.is_file())]
    for script in (*SCRIPTS, *asked, TABLES):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, "-m", *script.split()], cwd=ROOT, check=True)
    for script, cost in LONG.items():
        if script not in asked:
            print(f"left out: {script} ({cost})")


if __name__ == "__main__":
    main()
