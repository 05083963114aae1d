"""Rows of the tables in docs/tuning-options.md."""

from __future__ import annotations

from typing import Any

from benchmarks.precision_tables import Table


def choice_rows(result: dict[str, Any]) -> Table:
    """Each choice of what is tuned, a row a seed."""
    rows: list[tuple[str, ...]] = []
    for row in sorted(result["rows"], key=lambda row: (row["tuned_numbers"] > 0, row["choice"], row["seed"])):
        seed = "" if not row["tuned_numbers"] else str(row["seed"])
        scores = f"{row['held_out_distance']:.2f}", f"{row['training_encoder_distance']:.2f}"
        times = ", ".join(f"{timestep:g}" for timestep in row["timesteps"])
        rows.append((row["choice"], seed, f"{row['tuned_numbers']:,}", *scores, times))
    return ("tuned", "seed", "numbers", "held-out encoder", "encoder of the loss", "timesteps"), rows


def aware_rows(result: dict[str, Any]) -> Table:
    """Each precision: float32, the same weights built in it, weights tuned in it."""
    exact = {row["seed"]: row["float32"]["distance"] for row in result["rows"] if row["precision"] == "fp32"}
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        if row["precision"] == "fp32":
            continue
        distances = exact[row["seed"]], row["built"]["distance"], row["tuned"]["distance"]
        ratio = f"{distances[2] / distances[0]:.2f}"
        pixels = f"{row['built']['rms_pixel_error']:.3f}", f"{row['tuned']['rms_pixel_error']:.3f}"
        texts = [f"{distance:.3f}" for distance in distances]
        best = str(row["best_iteration"])
        rows.append((f"`{row['precision']}`", str(row["seed"]), *texts, ratio, best, *pixels))
    heads = (
        "P",
        "seed",
        "tuned and built in fp32",
        "tuned in fp32, built in P",
        "tuned on in P, built in P",
        "of fp32's",
        "best iteration in P",
        "rms of a pixel, tuned in fp32",
        "tuned in P",
    )
    return heads, rows
