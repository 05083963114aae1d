"""Operators spoilt in the ONNX graph of the ddpm-cifar10 architecture -> benchmarks/results/bisect.json.

Each case spoils one operator of one step, chosen by a seed, and asks ``verify --bisect`` for it. Where rung 6 passes
all the same, as with a bias of zero that is subtracted, another operator is drawn; ``harmless`` counts them.
``seconds`` are those of rung 6 and the search, ``reference_seconds`` those of the fresh graph of the checkpoint, which
a command needs once. Cases that were run before are kept; ``--again`` starts afresh.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import RESULTS, save_cifar10, write_result
from benchmarks.faults import Lab
from mmd_export.blame import blame, checkpoint_graph
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.graph_parts import GraphParts
from mmd_export.parity import check_artefact
from mmd_export.plan import StepPlan
from mmd_export.runtime import RunOptions
from mmd_runtime.registry import runtime_for

STEPS = 2
CASES = 20
LIMIT_SECONDS = 120.0
# What an operator is swapped for; a Mul by itself, such as that of SiLU, loses one of its operands.
SWAPPED = {"Add": "Sub", "Sigmoid": "Tanh", "Mul": "Add"}
KINDS = ("weight", "swapped", "dropped")


def spoilt(model: ir.Model, kind: str, draw: np.random.Generator) -> tuple[int, str]:
    """Spoil one operator of the graph in place; returns the step, from 1, and the value that it gives."""
    graph, labels = model.graph, GraphParts(model).labels
    nodes = [node for node in graph if str(node.outputs[0].name).startswith("step.")]
    if kind == "weight":
        chosen = [node for node in nodes if node.op_type == "Conv"]
    elif kind == "swapped":
        chosen = [node for node in nodes if node.op_type in SWAPPED]
    else:
        chosen = [node for node in nodes if node.op_type == "Sigmoid"]
    inside = [node for node in chosen if labels[str(node.outputs[0].name)] not in ("plan", "decoder")]
    node = inside[int(draw.integers(len(inside)))]
    value = str(node.outputs[0].name)
    if kind == "weight":
        scale_weight(graph, node, draw)
    else:
        _replace(node, SWAPPED[node.op_type] if kind == "swapped" else "Identity")
    return int(value.removeprefix("step.").split("/")[0]) + 1, value


def scale_weight(graph: ir.Graph, node: ir.Node, draw: np.random.Generator) -> None:
    """This use of a weight reads a copy of it with one filter half as large; other steps read the right one."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[int(draw.integers(len(array)))] *= 0.5
    copy = ir.Value(
        name=f"{weight.name}/spoilt", type=weight.type, shape=weight.shape,
        const_value=ir.tensor(array, name=f"{weight.name}/spoilt"),
    )  # fmt: skip
    graph.register_initializer(copy)
    node.replace_input_with(1, copy)


def _replace(node: ir.Node, op_type: str) -> None:
    """Another operator in its place, with as many of its inputs as that takes and the same value."""
    inputs = list(node.inputs)[: 1 if op_type in ("Identity", "Tanh") else 2]
    other = ir.Node("", op_type, inputs, num_outputs=1, name=node.name)
    old, new = node.outputs[0], other.outputs[0]
    name, new.type, new.shape = old.name, old.type, old.shape
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, other)
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)
    new.name = name


def planted(lab: Lab, good: Bundle, model: ir.Model) -> Bundle:
    """The bundle with ``model`` as its artefact, sealed."""
    return lab.sealed(good, lambda folder: ir.save(model, folder / "model.onnx"))


def case(lab: Lab, good: Bundle, reference: ir.Model, kind: str, seed: int) -> dict[str, Any]:
    """One planted operator that breaks rung 6, and what was found."""
    draw, harmless = np.random.default_rng(seed), 0
    while True:
        model = ir.load(good.artefact_path)
        step, value = spoilt(model, kind, draw)
        bundle = planted(lab, good, model)
        start = time.perf_counter()
        rung = check_artefact(bundle, runtime_for(bundle.manifest.format), RunOptions(1))
        if not rung.passed:
            break
        harmless += 1
    found = blame(bundle, rung, ir.load(bundle.artefact_path), reference)
    seconds = time.perf_counter() - start
    label = GraphParts(reference).labels[value]
    right = found.step == step and found.value == value and found.block == label
    return {
        "planted": {
            "kind": kind, "seed": seed, "step": step, "value": value, "block": label, "harmless": harmless,
            "worst_error": rung.worst,
        },
        "found": asdict(found), "right": right, "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "bisect.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.out.exists() and not arguments.again:
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["cases"]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        source = str(save_cifar10(Path(folder) / "cifar10", "v_prediction"))
        good = build(BuildOptions(source, "onnx", Path(folder) / "good", steps=STEPS, sampler="ddim"), print)
        start = time.perf_counter()
        reference = checkpoint_graph(good, load_checkpoint(source), StepPlan.from_dict(good.manifest.plan))
        reference_seconds = round(time.perf_counter() - start, 1)
        for seed in sorted(set(range(CASES)) - {row["planted"]["seed"] for row in rows}):
            rows.append(case(lab, good, reference, KINDS[seed % len(KINDS)], seed))
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: row["planted"]["seed"])
            longest = max(row["seconds"] for row in rows) + reference_seconds
            found = {
                "cases": len(rows), "found": sum(row["right"] for row in rows), "longest_seconds": round(longest, 1),
                "limit_seconds": LIMIT_SECONDS,
            }  # fmt: skip
            values = {"steps": STEPS, "reference_seconds": reference_seconds, "summary": found, "cases": rows}
            write_result(arguments.out, "benchmarks/bisection.py", values)


if __name__ == "__main__":
    main()
