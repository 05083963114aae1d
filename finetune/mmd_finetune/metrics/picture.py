"""The values of an evaluation as one picture: a panel for each metric, a bar for each encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd_export.folders import output_file


def draw_metrics(result: Mapping[str, Any], path: Path) -> None:
    """Draw ``result["metrics"]`` (encoder -> metric -> value, low, high) into a PNG, complete or not at all.

    A value that is None is not defined.
    """
    from matplotlib.figure import Figure

    by_encoder = result["metrics"]
    names = list(next(iter(by_encoder.values())))
    figure = Figure(figsize=(2.4 * len(names) + 1.0, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for position, (encoder, found) in enumerate(by_encoder.items()):
            value, low, high = (found[name][key] for key in ("value", "low", "high"))
            reach = None if low is None else [[value - low], [high - value]]
            axis.bar(position, 0.0 if value is None else value, yerr=reach, capsize=4, label=encoder)
            if value is None:
                middle = {"ha": "center", "va": "center", "transform": axis.get_xaxis_transform()}
                axis.text(position, 0.5, "undefined", rotation=90, **middle)
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set(title=name, xticks=[])
        axis.grid(alpha=0.3, axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(by_encoder))
    figure.suptitle(f"{result['source']}: {result['count']} samples")
    with output_file(path) as file:
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})
