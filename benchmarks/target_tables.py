"""Rows of the tables of targets, from benchmarks/results/: targets.json, coreml.json, openvino.json."""

from __future__ import annotations

from typing import Any

from benchmarks.precision_tables import Table
from benchmarks.speed_tables import interval
from benchmarks.targets import MODELS, choices, target_of

NOT_MEASURED = {"refused": "not measured yet"}


def target_rows(result: dict[str, Any]) -> Table:
    """Target x precision, a row for each model of the study; a cell that was refused or not measured says so."""
    cells = result["cells"]
    heads = (
        "target", "precision", "model", "artefact", "of fp32", "nodes", "build, CPU s", "peak, GB",
        "error: sample", "worst state", "tolerance", "run in", "processor",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        row_of(
            model, target, precision,
            cell=cells.get(f"{model} | {target} | {precision}", NOT_MEASURED), full=cells.get(f"{model} | onnx | fp32"),
        )
        for target in choices()
        for precision in target_of(target).precisions
        for model in MODELS
    ]  # fmt: skip
    return heads, rows


def row_of(
    model: str, target: str, precision: str, *, cell: dict[str, Any], full: dict[str, Any] | None
) -> tuple[str, ...]:
    """One row; ``full`` is the ONNX fp32 artefact of the model, of which the size is a fraction."""
    name = (f"`{target}`", f"`{precision}`", model)
    if "bytes" not in cell:
        why = cell.get("refused") or cell.get("failed", "")
        return (*name, "not run", "", "", "", "", "", "", "", why, cell.get("where", ""))
    fraction = "" if full is None or "bytes" not in full else f"{cell['bytes'] / full['bytes']:.2f}"
    where = f"not run: {cell['not_verified']}" if cell["not_verified"] else cell["runtime"]
    deferred = cell.get("deferred", False)
    return (
        *name,
        f"{cell['bytes'] / 1e6:.2f} MB{', deferred' if deferred else ''}",
        fraction,
        f"{cell['nodes']:,}",
        f"{cell['cpu_seconds']:.0f}",
        f"{cell['peak_memory_mb'] / 1000:.1f}",
        "not run" if cell["sample_error"] is None else f"{cell['sample_error']:.0e}",
        _state(cell),
        f"{cell['tolerance']:g}",
        f"not compiled here; its graph{' ' if cell['not_verified'] else ': '}{where}" if deferred else where,
        cell["where"],
    )


def _state(cell: dict[str, Any]) -> str:
    if cell["worst_state_error"] is not None:
        return f"{cell['worst_state_error']:.0e}"
    return "not run" if cell["not_verified"] else "not seen"


def coreml_rows(result: dict[str, Any]) -> Table:
    """Size, cost and error of each Core ML package."""
    rows: list[tuple[str, ...]] = []
    for row in result["packages"]:
        cost = (f"{row['cpu_seconds']:.0f}", f"{row['with_imports']:.0f}", f"{row['peak_memory_mb'] / 1000:.2f}")
        rows.append(
            (f"{row['model']}, {row['precision']}", f"{row['bytes'] / 1e6:.2f}", f"{row['ops']:,}", *cost,
             f"{row['worst']:.1e}", f"{row['evaluation_seconds']:.1f}")
        )  # fmt: skip
    heads = ("package", "MB", "ops", "conversion, CPU s", "with imports", "peak GB", "worst error", "evaluation, s")
    return heads, rows


def norm_rows(result: dict[str, Any]) -> Table:
    """GroupNorm by the way it is written."""
    rows: list[tuple[str, ...]] = [
        (row["way"], f"{row['network']}, {row['precision']}", f"{row['ops']:,}", f"{row['casts']}",
         f"{row['cpu_seconds']:.0f}", f"{row['worst']:.1e}")
        for row in result["norms"]
    ]  # fmt: skip
    heads = ("GroupNorm", "network", "ops", "of them casts", "conversion, CPU s", "worst error")
    return heads, rows


def engine_rows(result: dict[str, Any]) -> Table:
    """Engines of TensorRT-RTX and their graphs, as files and packed, each as a fraction of fp32 in its form too."""
    full = {row["form"]: row for row in result["rows"] if row["precision"] == "fp32"}
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        sizes = [(row[kind][size], full[row["form"]][kind][size]) for kind in ENGINE_KINDS for size in ENGINE_SIZES]
        cells = (f"{size / 1e6:.1f} ({size / whole:.2f})" for size, whole in sizes)
        seconds = row["tensorrt-rtx"]["unpacking_cpu_seconds"]
        rows.append((f"{row['form']}, {row['precision']}", *cells, f"{seconds:.1f}"))
    return ("MB (of fp32)", "graph", "graph, packed", "engine", "engine, --compress", "unpacking, CPU s"), rows


ENGINE_KINDS, ENGINE_SIZES = ("onnx", "tensorrt-rtx"), ("bytes", "packed_bytes")


def openvino_rows(result: dict[str, Any]) -> Table:
    """Size, load, parity and speed of OpenVINO IR and of the ONNX graph, for each model."""
    rows: list[tuple[str, ...]] = [
        (
            f"{model}, {name}",
            f"{facts['bytes'] / 1e6:.2f}",
            f"{facts['nodes']:,}",
            f"{facts['build_cpu_seconds']:.0f}",
            f"{facts['load_cpu_seconds']:.1f}",
            f"{facts['worst_error']:.0e}",
            interval(values["times_faster_than_eager"][name]),
        )
        for model, values in result["models"].items()
        for name, facts in values["artefacts"].items()
    ]
    heads = ("", "MB", "nodes", "build, CPU s", "load, CPU s", "worst error", "times faster than eager")
    return heads, rows
