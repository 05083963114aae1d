"""The tables of docs/comparison.md on optimum itself, from results/optimum.json."""

from __future__ import annotations

from typing import Any

from benchmarks.optimum_worker import FIXED, GRAPH, PIPELINE, SESSIONS
from benchmarks.precision_tables import Table
from benchmarks.speed_tables import interval


def call_rows(result: dict[str, Any]) -> Table:
    """What optimum takes, as times of the one graph of the same run, for each model."""
    models = result["models"].values()
    alone = f"its UNet {result['steps']} times and its decoder once, without pipeline and scheduler"
    one_thread = "the same on one thread, in processor time"
    return ("optimum takes, times the one graph", *result["models"]), [
        ("a call of its pipeline", *(interval(values["takes"][PIPELINE]) for values in models)),
        (alone, *(interval(values["takes"][SESSIONS]) for values in models)),
        (one_thread, *(interval(values["processor_time"][SESSIONS]) for values in models)),
        (f"{one_thread}, with fixed shapes", *(interval(values["processor_time"][FIXED]) for values in models)),
        ("a fresh process until it is ready", *(interval(values["loading"]) for values in models)),
        ("*largest difference of the two images*", *(f"{values['largest_difference']:.0e}" for values in models)),
    ]


def shipped_rows(result: dict[str, Any]) -> Table:
    """What is shipped, loaded and installed, for the last model, which is the largest."""
    *_, (name, values) = result["models"].items()
    sides = (PIPELINE, GRAPH)
    shipped, opened = ([values[key][side] for side in sides] for key in ("shipped", "opened"))
    packages = [result["packages"][side] for side in sides]
    return (name, *sides), [
        ("files", *(str(side["files"]) for side in shipped)),
        ("MB (those of the timed call)", *(_megabytes(side) for side in shipped)),
        ("onnxruntime sessions", *(str(side["sessions"]) for side in opened)),
        ("peak memory of a fresh process, ready, MB", *(str(side["peak_memory_mb"]) for side in opened)),
        ("Python packages to install", *(str(side["count"]) for side in packages)),
        ("their size, MB", *(f"{side['bytes'] / 1e6:,.0f}" for side in packages)),
    ]


def _megabytes(side: dict[str, Any]) -> str:
    return f"{side['bytes'] / 1e6:.1f} ({side['bytes_of_the_timed_call'] / 1e6:.1f})"
