"""How often a gate is wrong, and how long it takes, by real gates -> benchmarks/results/latency_gate.json.

Each gate is the command itself in a fresh process: ``mmd-export bench NEW --against OLD --max-regression 5%``. Two
kinds alternate, so that both meet the same noise:

- ``equal``: NEW and OLD are two builds of the digits with 10 steps. A gate that fails is a false alarm.
- ``slower``: NEW has 11 steps, so that it really does a tenth more work. A gate that does not fail has missed it.

It can be interrupted and goes on with what lies in the partial file beside the result; ``--minutes`` ends it early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, write_result
from mmd_export.build import BuildOptions, build

STEPS, SLOWER_STEPS = 10, 11
LIMIT = "5%"
KINDS = {"equal": 200, "slower": 100}  # so many gates of each
THREADS = 1


def bundles(folder: Path) -> dict[str, Path]:
    """The reference, and what is held against it, by kind."""
    found = {}
    for name, steps in (("old", STEPS), ("equal", STEPS), ("slower", SLOWER_STEPS)):
        found[name] = folder / name
        build(BuildOptions("digits", "onnx", found[name], steps=steps, verify=False))
    return found


def one_gate(new: Path, old: Path) -> dict[str, Any]:
    """Run the command; what it decided and how long all of it took."""
    bench = ("-m", "mmd_export.cli", "bench")
    command = [sys.executable, *bench, str(new), "--against", str(old), "--max-regression", LIMIT]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--threads", str(THREADS), "--json", "-"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 6):
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-500:]}")
    report = json.loads(done.stdout)
    gate, environment = report["gates"][0], report["environment"]
    return {
        "exit_code": done.returncode, "verdict": gate["verdict"], "seconds": round(seconds, 2),
        "ratio": gate["now"]["median"], "low": gate["now"]["low"], "high": gate["now"]["high"],
        "blocks": gate["now"]["blocks"], "rounds": gate["now"]["rounds"],
        "load": [environment["load_before"], environment["load_after"]],
    }  # fmt: skip


def next_kind(rows: list[dict[str, Any]], wanted: dict[str, int]) -> str | None:
    """The kind of which the smaller share is done; None once all are."""
    done = {kind: sum(row["kind"] == kind for row in rows) for kind in wanted}
    left = [kind for kind in wanted if done[kind] < wanted[kind]]
    return min(left, key=lambda kind: done[kind] / wanted[kind]) if left else None


def summary(gates: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Counts and times of one kind."""
    verdicts = [gate["verdict"] for gate in gates]
    ratios, seconds = [gate["ratio"] for gate in gates], [gate["seconds"] for gate in gates]
    return {
        "gates": len(gates), **{verdict: verdicts.count(verdict) for verdict in ("pass", "fail", "undecided")},
        "false_alarms" if kind == "equal" else "found": verdicts.count("fail"),
        "median_ratio": statistics.median(ratios), "lowest_ratio": min(ratios), "highest_ratio": max(ratios),
        "median_seconds": statistics.median(seconds), "longest_seconds": max(seconds),
        "load_1_minute": [min(gate["load"][0][0] for gate in gates), max(gate["load"][1][0] for gate in gates)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, gates in KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=gates, help="gates of this kind")
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_gate.json")
    arguments = parser.parse_args()
    partial = arguments.out.with_suffix(".partial.jsonl")
    rows = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    wanted = {name: getattr(arguments, name) for name in KINDS}
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        found = bundles(Path(scratch))
        while time.monotonic() < end and (kind := next_kind(rows, wanted)):
            rows.append({"kind": kind, **one_gate(found[kind], found["old"])})
            with partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(len(rows), rows[-1], flush=True)
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    results = {kind: summary(gates, kind) for kind, gates in kinds.items() if gates}
    values = {"limit": LIMIT, "steps": STEPS, "slower_steps": SLOWER_STEPS, "threads": THREADS, "gates": rows}
    write_result(arguments.out, "benchmarks/latency_gate.py", {"results": results, **values})
    if next_kind(rows, wanted) is None:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
