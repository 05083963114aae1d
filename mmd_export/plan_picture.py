"""A plan as a picture: timesteps, noise levels and the coefficients of every step. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError
from mmd_export.folders import output_file
from mmd_export.plan import Source, StepPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Source, str] = {"state": "C0", "output": "C1", "clean": "C2", "noise": "C7"}
MARKERS = "os^Dv<>ph"
LINEAR_BELOW = 0.1  # weights are drawn on a symmetric log scale


def save_plan_picture(plan: StepPlan, path: Path) -> None:
    """Write the picture as a PNG that appears complete or not at all."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotAvailableError(f"--plot needs matplotlib ({error}); pip install 'mmd-export[tune]'") from error
    figure = Figure(figsize=(8.0, 8.0), layout="constrained")
    times, levels, weights = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 2))
    calls = "1 network call" if plan.step_count == 1 else f"{plan.step_count} network calls"
    figure.suptitle(f"{plan.solver}, {calls}, {plan.prediction_type}, {plan.noisy_steps} step noises")
    _draw_times(times, plan)
    _draw_levels(levels, plan)
    _draw_weights(weights, plan)
    with output_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _draw_times(axes: Axes, plan: StepPlan) -> None:
    axes.plot(range(1, plan.step_count + 1), plan.timesteps, "o-", color="C3")
    axes.set_ylabel("timestep")


def _draw_levels(axes: Axes, plan: StepPlan) -> None:
    calls = range(1, plan.step_count + 1)
    axes.plot(calls, [step.alpha for step in plan.steps], "o-", label="alpha")
    axes.plot(calls, [step.sigma for step in plan.steps], "s-", label="sigma")
    if any(step.scale != 1.0 for step in plan.steps):
        axes.plot(calls, [step.scale for step in plan.steps], "x:", label="input scale")
    axes.set_ylabel("level of the input")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_weights(axes: Axes, plan: StepPlan) -> None:
    """One series for each symbol and its age: ``output - 1`` is the output of the call before, drawn hollow."""
    from matplotlib.ticker import MaxNLocator

    order = list(COLOURS)
    for (source, age), points in sorted(weight_series(plan).items(), key=lambda item: (order.index(item[0][0]), item)):
        label = source if age == 0 else f"{source} - {age}"
        marker = MARKERS[min(age, len(MARKERS) - 1)]
        colour = COLOURS[source]
        face = colour if age == 0 else "none"
        line = "-" if age == 0 else ":"
        axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour, mfc=face, lw=0.8, label=label)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.axhline(0.0, color="0.8", zorder=0)
    axes.set_ylabel("weight in the next state")
    axes.set_xlabel("network call")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, plan.step_count + 0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def weight_series(plan: StepPlan) -> dict[tuple[Source, int], list[tuple[int, float]]]:
    """(source, age in calls) -> (call, weight); all noises are one series."""
    series: dict[tuple[Source, int], list[tuple[int, float]]] = defaultdict(list)
    for k, step in enumerate(plan.steps):
        for term in step.update:
            age = 0 if term.source == "noise" else k - term.index
            series[term.source, age].append((k + 1, term.weight))
    return dict(series)
