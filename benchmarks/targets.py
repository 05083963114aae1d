"""Every target and precision on three models: costs and errors of a build -> benchmarks/results/targets.json.

One cell a process, so that CPU seconds (with those of compilers it starts) and peak memory are its own. ``--model``,
``--target`` and ``--precision`` choose cells; one that was written before is not run again but with ``--again``.
Parity is the bound of the manifest: the worst error of the sample and of any state, rounded up to one digit. A target
whose compiler is not here is measured as ``--defer`` leaves it: the graph, run by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, SMALL_UNET, environment, save_cifar10, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.errors import MmdExportError
from mmd_export.exit_codes import how_it_ended
from mmd_export.target_options import TargetOptions
from mmd_export.targets import DeferrableTarget, Target, get_target, target_names
from mmd_runtime.registry import runtime_for

STEPS = 5
MODELS = ("digits", "class-conditional 16x16", "ddpm-cifar10 architecture")
# Options besides --precision that change what is made, by how the command line spells them after the target.
VARIANTS: dict[str, dict[str, Any]] = {
    "tensorrt-rtx --form loop": {"form": "loop"},
    "torch --device cuda": {"of_target": TargetOptions(device="cuda")},
}
LIMIT_SECONDS = 1200


def choices() -> list[str]:
    """Every target, and behind it its variants."""
    found = [*target_names(), *VARIANTS]
    return sorted(found, key=lambda name: (name.split()[0], name))


def target_of(choice: str) -> Target:
    """The target of one of ``choices``."""
    return get_target(choice.split(maxsplit=1)[0])


def saved(model: str, folder: Path) -> str:
    """MODEL of one of ``MODELS``; random networks predict v, whose samples do not all end at the clamp."""
    if model == "digits":
        return "digits"
    if model == "ddpm-cifar10 architecture":
        return str(save_cifar10(folder / "ddpm-cifar10", "v_prediction"))
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(**SMALL_UNET, num_class_embeds=10).save_pretrained(folder / "conditional")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder / "conditional")
    return str(folder / "conditional")


def measure(model: str, target: str, precision: str) -> dict[str, Any]:
    """One cell: a whole build with its reference and verification, or the line that refused it."""
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(model, Path(scratch))
        os.environ["MMD_EXPORT_CACHE"] = str(Path(scratch) / "cache")  # an engine of an earlier run costs nothing
        start = time.perf_counter()
        made = target_of(target)
        deferred = isinstance(made, DeferrableTarget) and not made.compiler().available
        try:
            options = BuildOptions(
                source, made.name, Path(scratch) / "bundle", precision,
                steps=STEPS, sampler="ddim", defer=deferred, **VARIANTS.get(target, {}),
            )  # fmt: skip
            bundle = build(options, lambda text: print(f"  {text}", flush=True))
        except MmdExportError as error:
            return {"refused": " ".join(str(error).replace(scratch, "").split())}
        spent = {"wall_seconds": round(time.perf_counter() - start, 1), **costs()}
        return {"deferred": deferred, **spent, **facts(bundle)}


def costs() -> dict[str, Any]:
    """CPU seconds of this process and of all that it started; the larger of their peaks."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return {
        "cpu_seconds": round(seconds, 1),
        "peak_memory_mb": round(max(usage.ru_maxrss for usage in usages) / 1024),
    }


def facts(bundle: Bundle) -> dict[str, Any]:
    """Size, ops and parity, and what measured it."""
    manifest, runtime = bundle.manifest, runtime_for(bundle.manifest.format)
    found, parity = runtime.availability(), manifest.parity
    states = [value for name, value in (parity or {}).items() if name != "sample"]
    return {
        "bytes": bundle.artefact_bytes,
        "unique_weight_bytes": manifest.graph.unique_weight_bytes,
        "nodes": manifest.graph.nodes,
        "toolchain": dict(manifest.toolchain),
        "runtime": f"{runtime.name}: {found.detail}",
        "tolerance": manifest.tolerance.atol,
        "sample_error": None if parity is None else parity["sample"],
        "worst_state_error": max(states) if states else None,
        "states_unseen": runtime.unseen,
        "not_verified": "" if parity is not None else unverified_because(bundle.card),
    }


def unverified_because(card: str) -> str:
    """The reason in a model card, on one line."""
    found = re.search(r"\*\*not verified: (.*?)\*\*", card, re.DOTALL)
    if found is None:
        raise ValueError("the card says neither how it was verified nor why not")
    return " ".join(found[1].split())


def processors() -> str:
    """Of this machine, the GPU's name too if there is one."""
    facts = environment()
    return " and ".join(filter(None, (facts["cpu"], (facts["gpu"] or {}).get("name"))))


def run_cell(model: str, target: str, precision: str) -> dict[str, Any]:
    """The cell in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part.json"
        command = [sys.executable, "-m", "benchmarks.targets", "--model", model, "--target", target]
        try:
            ended = subprocess.run(
                [*command, "--precision", precision, "--cell", str(part)], cwd=ROOT, timeout=LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"refused": f"not done after {LIMIT_SECONDS} s"}
        if ended.returncode:
            return {"failed": f"its process {how_it_ended(ended.returncode)}"}
        found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--target", choices=choices())
    parser.add_argument("--precision")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--cell", type=Path, help="measure the one cell in this process and write it there")
    parser.add_argument("--out", type=Path, default=RESULTS / "targets.json")
    arguments = parser.parse_args()
    if arguments.cell:
        cell = measure(arguments.model, arguments.target, arguments.precision)
        arguments.cell.write_text(json.dumps(cell), encoding="utf-8")
        return
    old = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    known = {
        f"{model} | {target} | {precision}"
        for model in MODELS for target in choices() for precision in target_of(target).precisions
    }  # fmt: skip
    cells: dict[str, Any] = {key: cell for key, cell in old.get("cells", {}).items() if key in known}
    for cell in cells.values():
        cell.setdefault("where", old["environment"]["cpu"])
    for model in (arguments.model,) if arguments.model else MODELS:
        for target in (arguments.target,) if arguments.target else choices():
            for precision in (arguments.precision,) if arguments.precision else target_of(target).precisions:
                key = f"{model} | {target} | {precision}"
                if "bytes" in cells.get(key, {}) and not arguments.again:
                    continue
                print(key, flush=True)
                cells[key] = run_cell(model, target, precision) | {"where": processors()}
                print(f"  {cells[key]}", flush=True)
                write_result(arguments.out, "benchmarks/targets.py", {"steps": STEPS, "cells": cells})


if __name__ == "__main__":
    main()
