"""The curve of a run: loss and held-out distance by iteration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the log's ``loss`` and ``held_out`` into a PNG; matplotlib without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss_axis, distance_axis = figure.subplots(1, 2)
    for axis, key, title in (
        (loss_axis, "loss", "MMD² (loss)"),
        (distance_axis, "held_out", "held-out Fréchet distance"),
    ):
        points = [(line["iteration"], line[key]) for line in lines if key in line]
        axis.plot([x for x, _ in points], [y for _, y in points], marker="." if key == "held_out" else "")
        axis.set(xlabel="iteration", title=title)
        axis.grid(alpha=0.3)
    if all(line["held_out"] > 0 for line in lines if "held_out" in line):
        distance_axis.set_yscale("log")
    figure.savefig(path, dpi=110, metadata={"Software": None})
