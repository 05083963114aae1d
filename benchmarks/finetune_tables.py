"""The table of docs/estimators.md: speed and memory of tuning, from benchmarks/results/finetune_speed*.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.precision_tables import Table

LARGE = "ours 4096 in micro-batches"


def speed_rows(results: Mapping[str, dict[str, Any]]) -> Table:
    """Heads and rows, one for each model; ``results`` by the device's name."""
    heads = (
        "model, 5 steps, batch 256", "plain, images/s", "ours, images/s", "times faster (95 %)",
        "plain, added MB", "ours, added MB", "ours at batch 4,096", "ratio to batch 256",
    )  # fmt: skip
    return heads, [
        _row(f"{name}, {device}", values)
        for device, result in results.items()
        for name, values in result["models"].items()
    ]


def _row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    ratio, memory, images = values["times_faster"], values["memory"], values["images_per_second"]
    interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    added = (f"{memory[case]['added_mb']:,.0f}" for case in ("plain 256", "ours 256", LARGE))
    return (
        name, f"{images['plain']:.1f}", f"{images['ours']:.1f}", f"{ratio['median']:.2f}{interval}", *added,
        f"{values['memory_4096_to_256']['added_mb']:.2f}",
    )  # fmt: skip
