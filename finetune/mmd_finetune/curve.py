"""The curves of a run: loss, held-out distance and further metrics by iteration, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCALARS: tuple[str, ...] = ("loss", "held_out", "gradient")
SIDES = ("low", "high")
TITLES = {"loss": "MMD² (loss)", "held_out": "held-out Fréchet distance"}


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of one line of the log by name: those of ``SCALARS``, and with slashes those of its groups."""
    flat: dict[str, float] = {key: float(line[key]) for key in SCALARS if key in line}
    for group in ("losses", "held_out_by_encoder", "metrics"):
        flat |= {f"{group}/{name}": float(value) for name, value in line.get(group, {}).items()}
    for encoder, values in line.get("metrics_by_encoder", {}).items():
        flat |= {f"metrics_by_encoder/{encoder}/{name}": float(value) for name, value in values.items()}
    for encoder, by_name in line.get("intervals", {}).items():
        for name, bounds in by_name.items():
            if None not in bounds:
                flat |= {f"intervals/{encoder}/{name}/{side}": bounds[i] for i, side in enumerate(SIDES)}
    return flat


def draw_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss, held-out distance and further metrics of the log into a PNG, the 95 % intervals as bands."""
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[int, float]]] = {"loss": [], "held_out": []}
    for line in lines:
        for name, value in scalars(line).items():
            if name in points or name.startswith("metrics/"):
                points.setdefault(name, []).append((line["iteration"], value))
    figure = Figure(figsize=(3.5 * len(points), 3.2), layout="constrained")
    for axis, (name, curve) in zip(figure.subplots(1, len(points)), points.items(), strict=True):
        axis.plot([x for x, _ in curve], [y for _, y in curve], marker="" if name == "loss" else ".")
        if band := _band(lines, "frechet" if name == "held_out" else name.removeprefix("metrics/")):
            axis.fill_between(*zip(*band, strict=True), alpha=0.2, linewidth=0)
        axis.set(xlabel="iteration", title=TITLES.get(name, name.removeprefix("metrics/")))
        axis.grid(alpha=0.3)
        if name == "held_out" and curve and all(y > 0 for _, y in curve):
            axis.set_yscale("log")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 0.5 * min(y for _, y in curve)))  # a bound may be negative
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _band(lines: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float, float]]:
    """(iteration, low, high) of a metric in the encoder that decides, which comes first."""
    found = [(line["iteration"], next(iter(line["intervals"].values()))) for line in lines if "intervals" in line]
    bounds = ((iteration, *by_name.get(metric, (None, None))) for iteration, by_name in found)
    return [(iteration, low, high) for iteration, low, high in bounds if low is not None]
