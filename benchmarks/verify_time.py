"""How long ``verify`` of the digits bundle takes from the golden file alone -> benchmarks/results/verify_time.json.

Each run is a fresh process of the command as a user calls it, 5 steps, batch 1: its seconds by the clock and of the
processor, and which of the heavy packages it imported. A machine that is busy makes the clock pessimistic; ``load``
says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, write_result
from mmd_export.build import BuildOptions, build

STEPS = 5
RUNS = 10
LIMIT_SECONDS = 3.0
HEAVY = ("torch", "diffusers", "onnxscript", "scipy", "matplotlib")
_COMMAND = """
import json, sys
from mmd_export.cli import app, run
code = run(app, ["verify", sys.argv[1], "--json", sys.argv[2]])
print(json.dumps({"code": code, "imported": sorted(set(sys.argv[3:]) & set(sys.modules))}))
"""


def verified(bundle: Path, report: Path) -> dict[str, Any]:
    """One process: what it took, imported and found; ``report`` is where it writes its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    arguments = [sys.executable, "-c", _COMMAND, str(bundle), str(report), *HEAVY]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads(done.stdout.splitlines()[-1])
    found = json.loads(report.read_text(encoding="utf-8"))
    facts = {"passed": found["passed"], "verified_fraction": found["verified_fraction"], **said}
    return {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "load": os.getloadavg()[0], **facts}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the runs, and whether all of them kept the limit and imported nothing heavy."""
    walls, cpus = ([run[key] for run in runs] for key in ("wall_seconds", "cpu_seconds"))
    return {
        "runs": len(runs), "limit_seconds": LIMIT_SECONDS,
        "wall_seconds": {"fastest": min(walls), "median": median(walls), "slowest": max(walls)},
        "cpu_seconds": {"fastest": min(cpus), "median": median(cpus), "slowest": max(cpus)},
        "within_limit": sum(wall < LIMIT_SECONDS for wall in walls),
        "imported": sorted({name for run in runs for name in run["imported"]}),
        "passed": all(run["passed"] and run["code"] == 0 for run in runs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS / "verify_time.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(BuildOptions("digits", "onnx", Path(folder) / "digits-5", steps=STEPS)).folder
        verified(bundle, Path(folder) / "report.json")  # the first one reads the disk
        runs = [verified(bundle, Path(folder) / "report.json") for _ in range(arguments.runs)]
    values = {"steps": STEPS, "looked_for": list(HEAVY), "summary": summary(runs), "runs": runs}
    write_result(arguments.out, "benchmarks/verify_time.py", values)
    print(values["summary"])


if __name__ == "__main__":
    main()
