"""The kits ``web`` and ``node`` on the built-in digits: first image of the page, its bytes, time of a batch.

Embeds a 5-step bundle, installs and builds both projects from their lock files, opens the page in a fresh headless
Chromium a load, on WebAssembly, and runs the self-test in Node and in Python. Needs npm and a Chromium.

    python -m benchmarks.web_kit [--loads 10] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.commands.embed import EmbedOptions, embed
from mmd_runtime.app import open_bundle

STEPS, ROUNDS = 5, 50
LIMITS = {"first_image_ms": 2000, "page_bytes": 150_000}
NODE = f"""
import {{ open }} from "mmd-sampler-node";
const sampler = await open("bundle", {{ threads: 1 }});
await sampler.selfTest(5);
console.log(JSON.stringify(await sampler.selfTest({ROUNDS})));
"""


def project(kit: str, bundle: Path, out: Path) -> Path:
    """An embedded project, installed and built."""
    embed(EmbedOptions(bundle, kit, out))
    for command in (["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"], ["npm", "run", "build"]):
        subprocess.run(command, cwd=out, check=True, stdout=subprocess.DEVNULL)
    return out


def said(command: list[str], folder: Path) -> dict[str, Any]:
    """The JSON that a command prints."""
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def version(program: str) -> str:
    """What ``--version`` says."""
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.strip()


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def in_browser(folder: Path, loads: int) -> dict[str, Any]:
    """All loads of the page, summed up; every self-test must have passed and no load may have complained."""
    found = said(["node", "test/measure.mjs", str(loads)], folder)
    every = found["loads"]
    assert all(load["selfTest"]["passed"] for load in every), "a self-test failed"
    return {
        "chromium": found["chromium"], "backend": every[0]["backend"], "threads": every[0]["threads"], "loads": loads,
        "first_image_ms": spread([load["firstImage"] for load in every]),
        "bundle_ms": spread([load["times"]["bundle"] for load in every]),
        "graph_ms": spread([load["times"]["graph"] for load in every]),
        "batch_ms": spread([load["selfTest"]["milliseconds"] for load in every]),
        "largest_error": max(load["selfTest"]["worst"] for load in every),
        "tolerance": every[0]["selfTest"]["tolerance"],
        "bytes": every[0]["bytes"],
        "problems": sorted({problem for load in every for problem in load["problems"]}),
    }  # fmt: skip


def measure(loads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        bundle = build(BuildOptions("digits", "onnx", Path(place) / "digits", steps=STEPS)).folder
        web = in_browser(project("web", bundle, Path(place) / "web"), loads)
        node = said(["node", "--input-type=module", "--eval", NODE], project("node", bundle, Path(place) / "node"))
        sampler = open_bundle(bundle, threads=1)
        sampler.self_test(5)
        python = sampler.self_test(ROUNDS)
    return {
        "model": "digits", "steps": STEPS, "limits": LIMITS, "node_version": version("node"), "web": web,
        "node": {"batch_ms": round(node["milliseconds"], 3), "largest_error": node["worst"], "threads": 1},
        "python": {"batch_ms": round(python.milliseconds, 3), "largest_error": python.worst, "threads": 1},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "web.json")
    options = parser.parse_args()
    write_result(options.out, "benchmarks/web_kit.py", measure(options.loads))


if __name__ == "__main__":
    main()
