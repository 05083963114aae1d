"""The table of docs/targets.md: target x precision, a row for each model, from benchmarks/results/targets.json."""

from __future__ import annotations

from typing import Any


def target_rows(cells: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows; a cell that was refused or never measured says why."""
    heads = (
        "target", "precision", "model", "artefact", "of fp32", "nodes", "build, CPU s", "peak, GB",
        "error: sample", "worst state", "tolerance", "where",
    )  # fmt: skip
    rows = [
        row_of(*key.split(" | "), cell=cell, full=cells.get(f"{key.split(' | ')[0]} | onnx | fp32"))
        for key, cell in sorted(cells.items(), key=lambda item: [*item[0].split(" | ")[1:], item[0]])
    ]
    return heads, rows


def row_of(
    model: str, target: str, precision: str, *, cell: dict[str, Any], full: dict[str, Any] | None
) -> tuple[str, ...]:
    """One row; ``full`` is the ONNX fp32 artefact of the model, of which the size is a fraction."""
    name = (f"`{target}`", f"`{precision}`", model)
    if "bytes" not in cell:
        return (*name, "not built", "", "", "", "", "", "", "", cell.get("refused") or cell.get("failed", ""))
    fraction = "" if full is None or "bytes" not in full else f"{cell['bytes'] / full['bytes']:.2f}"
    where = f"not run: {cell['not_verified']}" if cell["not_verified"] else cell["runtime"]
    return (
        *name,
        f"{cell['bytes'] / 1e6:.2f} MB",
        fraction,
        f"{cell['nodes']:,}",
        f"{cell['cpu_seconds']:.0f}",
        f"{cell['peak_memory_mb'] / 1000:.1f}",
        "not run" if cell["sample_error"] is None else f"{cell['sample_error']:.0e}",
        _state(cell),
        f"{cell['tolerance']:g}",
        where,
    )


def _state(cell: dict[str, Any]) -> str:
    if cell["worst_state_error"] is not None:
        return f"{cell['worst_state_error']:.0e}"
    return "not run" if cell["not_verified"] else "not seen"
