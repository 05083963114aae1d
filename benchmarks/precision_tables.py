"""Rows of the tables in docs/precision.md, from benchmarks/results/precision.json."""

from __future__ import annotations

from typing import Any, TypeAlias

Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]
AIM = 0.01  # of an image, in 16 bits
_FORCED = " teacher-forced"


def precision_rows(result: dict[str, Any]) -> Table:
    """Each precision: part of the float32 file on both models, worst errors, distance."""
    rows: list[tuple[str, ...]] = []
    for name, row in result["precisions"].items():
        part = row["bytes"] / result["precisions"]["fp32"]["bytes"]
        forced = max(error["max"] for key, error in row["errors"].items() if key.endswith(_FORCED))
        free = max(error["max"] for key, error in row["errors"].items() if not key.endswith(_FORCED))
        errors = (f"{forced:.0e}", f"{free:.0e}", f"{row['rms_pixel_error']:.0e}")
        size = f"{result['sizes'][name]['of_fp32']:.3f}"
        rows.append((f"`{name}`", size, f"{part:.3f}", *errors, f"{row['distance']:.2f}"))
    heads = (
        "P",
        "file, of fp32's: ddpm-cifar10",
        "digits",
        "worst error of one step",
        "of the chain",
        "rms of a pixel, to float32",
        "Frechet distance",
    )
    return heads, rows


def elsewhere_rows(result: dict[str, Any]) -> Table:
    """The precisions of other targets, the float32 graph in onnxruntime first."""
    rows: list[tuple[str, ...]] = [
        (f"`{name.replace(' ', '` `')}`", f"{row['bytes'] / 1e6:.2f}", f"{row['rms_pixel_error']:.0e}",
         f"{row['distance']:.2f}", row["runtime"])
        for name, row in result.get("elsewhere", {}).items()
    ]  # fmt: skip
    megabytes, distance = result["precisions"]["fp32"]["bytes"] / 1e6, result["float32"]["distance"]
    float32 = ("`onnx` `fp32`", f"{megabytes:.2f}", "", f"{distance:.2f}")
    heads = ("artefact", "MB", "rms of a pixel, to float32", "Frechet distance", "run in")
    return heads, [(*float32, "onnxruntime"), *rows]


def step_rows(result: dict[str, Any]) -> Table:
    """Largest error after each step, free-running, and teacher-forced in brackets."""
    steps = [f"state.{k}" for k in range(1, result["steps"] + 1)]
    rows: list[tuple[str, ...]] = []
    for name, row in result["precisions"].items():
        errors = row["errors"]
        cells = [f"{errors[step]['max']:.0e} ({errors[step + _FORCED]['max']:.0e})" for step in steps]
        rows.append((f"`{name}`", *cells))
    for name, row in result.get("steps_elsewhere", {}).items():
        errors = row["errors"]
        cells = [f"{errors[step]:.0e} ({errors[step + _FORCED]:.0e})" for step in steps]
        rows.append((f"`{name.replace(' ', '` `')}`", *cells))
    return ("P", *(f"step {k}" for k in range(1, len(steps) + 1))), rows


def island_rows(result: dict[str, Any]) -> Table:
    """16 bits with more and fewer operations in float32."""
    rows: list[tuple[str, ...]] = [
        (name, str(row["islands"]), f"{row['rms_pixel_error']:.1e}", f"{row['distance']:.3f}")
        for name, row in result["islands"].items()
    ]
    return ("16 bits", "operations of a call in float32", "rms of a pixel, to float32", "Frechet distance"), rows


def autocast_rows(result: dict[str, Any]) -> Table:
    """An existing converter beside ours."""
    rows: list[tuple[str, ...]] = [
        (row["tool"], f"{row['bytes'] / 1e6:.2f}", str(row["casts"]),
         "passes" if row["checker"] is None else "refuses it: not in topological order"
         if "topologically" in row["checker"] else f"refuses it: {row['checker']}",
         row["onnxruntime"] or f"{row['largest_error']:.0e}")
        for row in result["rows"]
    ]  # fmt: skip
    return ("made by", "MB", "casts", "`onnx.checker`", "largest error in onnxruntime"), rows


def end_rows(result: dict[str, Any]) -> Table:
    """What of half precision was tried in float32: errors of many images."""
    rows: list[tuple[str, ...]] = [
        (
            row["model"], f"`{row['target']}` `{row['precision']}`, {row['run']}", str(row["images"]), row["trial"],
            str(row["casts"]), f"{row['bytes'] / 1e6:.2f}", f"{row['worst']:.1e}", f"{row['p99']:.1e}",
            f"{row['median']:.1e}", str(row["beyond_aim"]),
        )
        for row in result["rows"]
    ]  # fmt: skip
    heads = ("model", "artefact", "images", "in float32", "casts", "MB", "worst image", "hundredth", "middle one",
             f"above {AIM:g}")  # fmt: skip
    return heads, rows


def int8_rows(result: dict[str, Any]) -> Table:
    """What was tried for int8, float32, and what ships."""
    rows: list[tuple[str, ...]] = [_trial("float32", "", result["float32"]), *(
        _trial(row["name"], str(row["images"]), row) for row in result["trials"]
    )]  # fmt: skip
    if "int8" in result["precisions"]:
        shipped = result["precisions"]["int8"]
        name = "**as shipped: mse, a range for each step, linear weights in 7 bits**"
        rows.append(_trial(name, str(result["images"]), shipped))
    heads = ("ranges, layers", "images", "rms of a pixel, to float32", "Frechet distance", "by draw", "integer kernels")
    return heads, rows


def _trial(name: str, images: str, row: dict[str, Any]) -> tuple[str, ...]:
    draws = " ".join(f"{distance:.2f}" for distance in row["by_draw"])
    kernels = str(row.get("integer_kernels", ""))
    return name, images, f"{row['rms_pixel_error']:.4f}", f"{row['distance']:.3f}", draws, kernels
