"""Every benchmark that needs no GPU, one after the other; about 2 hours on 2 quiet cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "benchmarks.schedulers",
    "benchmarks.artefacts",
    "benchmarks.forms",
    "benchmarks.speed",
    "benchmarks.openvino",
    "benchmarks.coreml",
    "benchmarks.targets",
    "benchmarks.digits_quality",
    "benchmarks.finetune_speed",
    "benchmarks.precision",
    "benchmarks.verify_time",
    "benchmarks.fault_injection",
    "benchmarks.distribution_rung",
    "benchmarks.bisect",
    "benchmarks.latency_gate",
    "benchmarks.example",
    "benchmarks.siblings",
    "benchmarks.web_kit",
    "benchmarks.ray_kit",
    "benchmarks.optimum_pipeline",
    "benchmarks.tables",
)


def main() -> None:
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, "-m", script], cwd=Path(__file__).parents[1], check=True)


if __name__ == "__main__":
    main()
