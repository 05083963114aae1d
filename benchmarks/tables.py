"""Write the tables of README.md and docs/ from benchmarks/results/ and from the code; ``--check`` compares only.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget_tables import ablation_rows, budget_rows, draw_budgets
from benchmarks.budget_tables import target_rows as reached_rows
from benchmarks.code_blocks import block_rows
from benchmarks.finetune_tables import speed_rows
from benchmarks.kit_tables import ray_rows, web_rows
from benchmarks.optimum_tables import call_rows, shipped_rows
from benchmarks.parity_tables import (
    bisect_rows,
    distribution_rows,
    fault_rows,
    honest_rows,
    tolerance_rows,
    verify_time_rows,
)
from benchmarks.precision_tables import (
    Table,
    autocast_rows,
    elsewhere_rows,
    end_rows,
    int8_rows,
    island_rows,
    precision_rows,
    step_rows,
)
from benchmarks.reference_tables import commands, manifest_rows, required_rows, result_rows, tool_rows
from benchmarks.speed_tables import form_rows, gate_rows, guidance_rows, interval, layer_rows, pipeline_rows
from benchmarks.target_tables import coreml_rows, engine_rows, norm_rows, openvino_rows, target_rows
from benchmarks.tuning_tables import aware_rows, choice_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
NOT_MEASURED = "not measured"


def read(name: str) -> dict[str, Any] | None:
    """One result file, or None if it was never written."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def of_words(rows: Callable[[], Table]) -> Callable[[], str]:
    """A table whose cells are text, from the code itself."""

    def table() -> str:
        heads, lines = rows()
        return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *lines))

    return table


def tools() -> str:
    """What the usual ways take, next to the one graph."""
    speed, artefacts = read("speed.json"), read("artefacts.json")
    return NOT_MEASURED if speed is None or artefacts is None else markdown(*tool_rows(speed, artefacts))


def quality() -> str:
    """Held-out Frechet distance of untuned step counts and of the tuned seeds."""
    result = read("digits_quality.json")
    if result is None:
        return NOT_MEASURED
    rows: list[tuple[str, ...]] = [(f"{row['steps']} steps, untuned", *scores(row), "") for row in result["untuned"]]
    for row in result["tuned"]:
        held_out, *others = scores(row)
        rows.append(
            (
                f"**{row['steps']} steps, tuned, seed {row['seed']}**",
                f"**{held_out}**",
                *others,
                f"{row['seconds']:.0f}",
            )
        )
    heads = ("sampler", "held-out encoder", "encoder of the loss", "rarest digit", "tuning, s")
    return markdown(heads, rows)


def scores(row: dict[str, Any]) -> tuple[str, str, str]:
    """Held-out distance, distance on the loss's own encoder, share of the rarest class."""
    rarest = f"{100 * min(row['classes']):.1f} %"
    return f"{row['held_out_distance']:.2f}", f"{row['training_encoder_distance']:.2f}", rarest


def artefacts() -> str:
    """Size, build, parity and speed of each ONNX artefact."""
    result = read("artefacts.json")
    if result is None:
        return NOT_MEASURED
    rows, processors = [], (read("openvino.json") or {"models": {}})["models"]
    for model, values in result["models"].items():
        size, build = values["size"], values["build"]
        ratios = values.get("latency", {}).get("ratios")
        speed = [interval(ratios[name]) if ratios else NOT_MEASURED for name in BASELINES]
        weights = f"{size['bytes'] / 1e6:.2f} MB ({size['unique_weight_bytes'] / 1e6:.2f})"
        costs = [
            f"{cost['cpu_seconds']:.0f} CPU s, {cost['peak_memory_mb'] / 1000:.1f} GB" if cost else NOT_MEASURED
            for cost in (values.get("compile"), build)
        ]
        times = processors.get(model, {}).get("times_faster_than_eager", {})
        speed[:1] = [interval(times[name]) if name in times else NOT_MEASURED for name in ONNX_GRAPHS]
        rows.append((model, weights, f"{size['nodes']:,}", *costs, f"{values['worst_artefact_error']:.0e}", *speed))
    heads = (
        "model",
        "file (weights)",
        "nodes",
        "export alone",
        "with reference and verification",
        "worst error",
        "torch eager takes, graph for any device",
        "torch eager takes, graph of `--device cpu`",
        "per-step session takes, graph for any device",
    )
    return markdown(heads, rows)


BASELINES = ("torch", "per-step")
ONNX_GRAPHS = ("onnxruntime", "onnxruntime --device cpu")


def gpu() -> str:
    """Latency on a GPU, if one was ever measured."""
    result = read("gpu_latency.json")
    batches = {} if result is None or result["smoke"] else result["values"]["batches"]
    rows = []
    for batch in ("1", "64"):
        found = batches.get(batch, {})
        for name, seconds in found.get("median_seconds", {}).items():
            ratio = found["ratio_to_eager"][name]["median"]
            rows.append((f"{name}, batch {batch}", f"{seconds * 1e3:.2f}", f"{1 / ratio:.2f}"))
        rows += [(f"{name}, batch {batch}", NOT_MEASURED, "") for name in found.get("skipped", {})]
        if not found:
            rows.append((f"all candidates, batch {batch}", NOT_MEASURED, ""))
    return markdown(("ddpm-cifar10 architecture, 5 steps", "median ms", "times faster than eager"), rows)


PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction", "edm", "trigflow")


def schedulers() -> str:
    """Scheduler x prediction type: error of the table against diffusers in float64, and diffusers' own float32."""
    result = read("schedulers.json")
    if result is None:
        return NOT_MEASURED
    rows = []
    for class_name, row in result["schedulers"].items():
        cells = [_errors(row["largest_relative_error"].get(kind)) for kind in PREDICTIONS]
        rows.append((class_name, f"`{row['sampler']}`", row["table"], *cells))
    return markdown(("scheduler", "`--sampler`", "table", *PREDICTIONS), rows)


def _errors(errors: dict[str, float | None] | None) -> str:
    if errors is None:
        return ""
    single = errors["float32"]
    return f"{errors['float64']:.0e}" + ("" if single is None else f" ({single:.0e})")


EXAMPLE = (
    "mmd-export finetune digits --steps 5 --out runs/digits-5",
    "mmd-export build runs/digits-5 --target onnx --out digits-5.bundle",
    "mmd-export verify digits-5.bundle --checkpoint runs/digits-5",
    "mmd-export bench digits-5.bundle --checkpoint runs/digits-5",
    "mmd-export sample digits-5.bundle --seed 7 --count 64 --out grid.png",
)
PICTURE = "![real scans, 100 steps, 5 steps before and after tuning](docs/images/digits.png)"


def example() -> str:
    """The commands of the worked example with what they printed and the picture; the commands alone if never run."""
    return f"{conversation(EXAMPLE, blank_lines=1)}\n\n{PICTURE}" if read("example.json") else conversation(EXAMPLE)


def tuned_example() -> str:
    """Tuning, building and drawing of the worked example, for a page that has things of these names already."""
    block = conversation((EXAMPLE[0], EXAMPLE[1], EXAMPLE[-1]))
    return block.replace("digits-5.bundle", "tuned.bundle").replace("grid.png", "tuned.png")


def conversation(commands: Sequence[str], blank_lines: int = 0) -> str:
    """Commands of the worked example as a block, each with what it printed in the run on record, if there is one."""
    printed = {line["command"]: line["printed"] for line in (read("example.json") or {"commands": []})["commands"]}
    parts = [f"$ {command}" + (f"\n{printed[command]}" if command in printed else "") for command in commands]
    return "```console\n" + ("\n" * (1 + blank_lines)).join(parts) + "\n```"


SIBLINGS = {
    "shortcut_finetuning": "shortcut",
    "one_step_generator": "one step",
    "progressive_distillation": "progressive",
    "latent_consistency": "consistency",
    "mmd_gradient_flow": "MMD flow",
}


def siblings() -> str:
    """Each example of docs/siblings.md: its plan, and the held-out distance of every kind of samples."""
    result = read("siblings.json")
    if result is None:
        return NOT_MEASURED
    rows = []
    for name, title in SIBLINGS.items():
        row = result["examples"][name]
        worst = next(rung["worst"] for rung in row["parity"] if rung["rung"] == 6)
        calls = len(row["timesteps"])
        cost = (f"{row['step_noises']}", f"{worst:.0e}", f"{row['seconds']:.0f}")
        distances = row["held_out_frechet_distance"]
        for kind in sorted(distances, key=lambda kind: (kind == row["trained"], kind)):
            trained, distance = kind == row["trained"], distances[kind]
            plan = (f"{row['solver']}, {calls}", *cost) if trained else ("", "", "", "")
            text = f"**{distance:.2f}**" if trained else f"{distance:.2f}"
            rows.append((f"{title}: {kind}", text, *plan))
    heads = ("samples", "held-out Frechet distance", "solver, calls", "step noises", "rung 6", "training, s")
    return markdown(heads, rows)


def of_result(name: str, rows: Callable[[dict[str, Any]], Table]) -> Callable[[], str]:
    """A table whose rows are made elsewhere."""

    def table() -> str:
        result = read(name)
        return NOT_MEASURED if result is None else markdown(*rows(result))

    return table


def finetune_speed() -> str:
    """Speed and memory of tuning, on the devices where it was measured."""
    found = {"CPU": read("finetune_speed.json"), "GPU": read("finetune_speed_cuda.json")}
    results = {device: result for device, result in found.items() if result is not None}
    return markdown(*speed_rows(results)) if results else NOT_MEASURED


# The studies of step budgets in docs/finetuning.md: which budget of ours is held against which untuned one.
BUDGETS = {"digits_budgets": ((5, 50), (3, 20)), "fashion": ((5, 20),), "cifar10": ((5, 20),)}


def of_budgets(name: str) -> Callable[[], str]:
    """All cells of one study, and the picture of them."""

    def table() -> str:
        result = read(f"{name}.json")
        picture = f"![distance and recall by step budget](images/{name}.png)"
        return NOT_MEASURED if result is None else f"{markdown(*budget_rows(result))}\n\n{picture}"

    return table


def of_targets(name: str) -> Callable[[], str]:
    """What one study was to reach."""

    def table() -> str:
        return markdown(*reached_rows(read(f"{name}.json") or {"cells": {}}, BUDGETS[name]))

    return table


TABLES: dict[str, Callable[[], str]] = {
    "finetune_speed": finetune_speed,
    "latency_gate": of_result("latency_gate.json", gate_rows),
    "coreml": of_result("coreml.json", coreml_rows),
    "coreml_norms": of_result("coreml.json", norm_rows),
    "targets": of_result("targets.json", target_rows),
    "engines": of_result("engines.json", engine_rows),
    "siblings": siblings,
    "quality": quality,
    "artefacts": artefacts,
    "gpu": gpu,
    "schedulers": schedulers,
    "example": example,
    "tuned_example": tuned_example,
    "forms": of_result("forms.json", form_rows),
    "forms_large": of_result("forms_large.json", form_rows),
    "speed": of_result("speed.json", pipeline_rows),
    "winograd": of_result("winograd.json", layer_rows),
    "openvino": of_result("openvino.json", openvino_rows),
    "web_kit": of_result("web.json", web_rows),
    "ray_kit": of_result("ray_kit.json", ray_rows),
    "precision": of_result("precision.json", precision_rows),
    "precision_elsewhere": of_result("precision.json", elsewhere_rows),
    "precision_steps": of_result("precision.json", step_rows),
    "guidance": of_result("guidance.json", guidance_rows),
    "autocast": of_result("autocast.json", autocast_rows),
    "islands": of_result("precision.json", island_rows),
    "half_ends": of_result("half_ends.json", end_rows),
    "int8": of_result("precision.json", int8_rows),
    "tuning_choices": of_result("plan_learning.json", choice_rows),
    "quantisation_aware": of_result("quantisation_aware.json", aware_rows),
    "mmd_ablation": of_result("mmd_ablation.json", ablation_rows),
    **{name: of_budgets(name) for name in BUDGETS},
    **{f"{name}_targets": of_targets(name) for name in BUDGETS},
    "tolerances": lambda: markdown(*tolerance_rows()),
    "verify_time": of_result("verify_time.json", verify_time_rows),
    "faults": of_result("fault_injection.json", fault_rows),
    "honest": of_result("fault_injection.json", honest_rows),
    "distribution": of_result("distribution_rung.json", distribution_rows),
    "bisect": of_result("bisect.json", bisect_rows),
    "code_blocks": of_words(block_rows),
    "commands": commands,
    "manifest": of_words(manifest_rows),
    "required": of_words(required_rows),
    "results": of_words(result_rows),
    "tools": tools,
    "optimum": of_result("optimum.json", call_rows),
    "optimum_shipped": of_result("optimum.json", shipped_rows),
}


def filled(text: str) -> str:
    """``text`` with every table written anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name in () if check else BUDGETS:
        if (result := read(f"{name}.json")) is not None:
            draw_budgets(result, ROOT / f"docs/images/{name}.png")
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if filled(text) == text:
            continue
        if check:
            print(f"{name}: its tables are not those of benchmarks/results/; run make tables", file=sys.stderr)
            return 1
        page.write_text(filled(text), encoding="utf-8")
        print(f"{name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
