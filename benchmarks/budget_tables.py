"""Rows of the tables in docs/finetuning.md, from the cells of the studies under benchmarks/results/, and their plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.precision_tables import Table

METHODS = {"untuned": "untuned", "paper": "the paper's recipe", "ours": "ours"}
REAL = "real"  # the cell of what real images reach
NOT_MEASURED = "not measured"
Cells = Mapping[str, Mapping[str, Any]]


def by_budget(cells: Cells) -> dict[int, dict[str, list[Mapping[str, Any]]]]:
    """Budget -> method -> the cells of its seeds; keys are METHOD/STEPS[/SEED]."""
    found: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for key, cell in cells.items():
        if key == REAL:
            continue
        method, steps = key.split("/")[:2]
        found.setdefault(int(steps), {}).setdefault(method, []).append(cell)
    return dict(sorted(found.items()))


def budget_rows(result: Mapping[str, Any]) -> Table:
    """A row for each budget and method that was measured, several seeds as their range; last the real images."""
    rows: list[tuple[str, ...]] = []
    for steps, methods in by_budget(result["cells"]).items():
        rows += [
            (f"{steps}, {label}", str(len(methods[method])), *_scores(methods[method]))
            for method, label in METHODS.items()
            if method in methods
        ]
    heads = ("steps", "seeds", "held-out encoder", "encoder of the loss", "recall", "of a half", "memorisation", "C_T")
    if REAL in result["cells"]:
        rows.append(
            ("real, one half in the other", "", "", "", "", _range([result["cells"][REAL]["half_recall"]]), "", "")
        )
    return heads, rows


def _scores(found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    columns: list[Callable[[Mapping[str, Any]], float | None]] = [
        lambda cell: cell["held_out_distance"],
        lambda cell: cell["loss_encoder_distance"],
        lambda cell: cell["recall"],
        lambda cell: cell.get("half_recall"),
        lambda cell: cell["memorisation"]["value"],
        lambda cell: None if cell["copying"] is None else cell["copying"]["value"],
    ]
    return tuple(_range([column(cell) for cell in found]) for column in columns)


def _range(values: Sequence[float | None]) -> str:
    """One number, or the lowest and the highest; empty where one is not defined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low} to {high}"


def target_rows(result: Mapping[str, Any], targets: Sequence[tuple[int, int]]) -> Table:
    """Ours against the untuned sampler at (few, many) steps, against the paper's recipe, and the recall."""
    cells = dict(result["cells"])
    verdicts = [
        (f"{few} steps, ours: at most the distance of {many} untuned", reaches(cells, few, many))
        for few, many in targets
    ]
    verdicts += [
        ("ours: a smaller distance than the paper's recipe, everywhere measured", beats_the_paper(cells)),
        ("ours: recall at least that of 20 steps untuned, everywhere measured", keeps_recall(cells, 20)),
        ("ours: recall of a half at least that of the other real half, everywhere measured", keeps_real_recall(cells)),
    ]
    said = {None: NOT_MEASURED, True: "yes", False: "no"}
    return ("every seed", ""), [(text, said[found]) for text, found in verdicts]


def ablation_rows(result: Mapping[str, Any]) -> Table:
    """A row for each cell of the ablation, the best first."""
    ordered = sorted(result["cells"].items(), key=lambda item: item[1]["held_out_distance"])
    rows: list[tuple[str, ...]] = [
        (*key.split("/"), f"{cell['held_out_distance']:.3f}", f"{cell['loss_encoder_distance']:.3f}",
         f"{cell['recall']:.3f}")
        for key, cell in ordered
    ]  # fmt: skip
    heads = ("kernel", "estimator", "reference", "batch", "seed", "held-out encoder", "encoder of the loss", "recall")
    return heads, rows


def worst(cells: Cells, steps: int, name: str, choose: Callable[..., float]) -> float | None:
    """``choose`` (max or min) of ``name`` over the seeds of ours; None if none was measured."""
    values = [float(cell[name]) for key, cell in cells.items() if key.startswith(f"ours/{steps}/")]
    return choose(values) if values else None


def reaches(cells: Cells, steps: int, untuned: int) -> bool | None:
    """Whether ours, every seed, is at most as far from the held-out images as ``untuned`` steps; None: not measured."""
    mine, bound = worst(cells, steps, "held_out_distance", max), cells.get(f"untuned/{untuned}")
    return None if mine is None or bound is None else mine <= float(bound["held_out_distance"])


def beats_the_paper(cells: Cells) -> bool | None:
    """Whether ours is better wherever both were measured; None: nowhere."""
    pairs = [(key, key.replace("ours/", "paper/")) for key in cells if key.startswith("ours/")]
    better = [
        float(cells[mine]["held_out_distance"]) < float(cells[theirs]["held_out_distance"])
        for mine, theirs in pairs
        if theirs in cells
    ]
    return all(better) if better else None


def keeps_recall(cells: Cells, untuned: int) -> bool | None:
    """Whether no budget of ours has a lower recall than the untuned sampler; None: not measured."""
    bound, recalls = (
        cells.get(f"untuned/{untuned}"),
        [cell["recall"] for key, cell in cells.items() if key.startswith("ours/")],
    )
    return None if bound is None or not recalls else min(recalls) >= bound["recall"]


def keeps_real_recall(cells: Cells) -> bool | None:
    """Whether no budget of ours has a lower recall in half the real images than the other half; None: not measured."""
    recalls = [cell["half_recall"] for key, cell in cells.items() if key.startswith("ours/") and "half_recall" in cell]
    return None if REAL not in cells or not recalls else min(recalls) >= cells[REAL]["half_recall"]


def draw_budgets(result: Mapping[str, Any], path: Path) -> None:
    """Held-out distance and recall by budget, a line for each method through the mean of its seeds."""
    from matplotlib.figure import Figure

    found = by_budget(result["cells"])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, title in (
        (axes[0], "held_out_distance", "held-out Fréchet distance"),
        (axes[1], "recall", "recall"),
    ):
        for method, label in METHODS.items():
            points = [
                (steps, [cell[name] for cell in methods[method]])
                for steps, methods in found.items()
                if method in methods
            ]
            if not points:
                continue
            means = [sum(values) / len(values) for _, values in points]
            axis.plot([steps for steps, _ in points], means, "o-", label=label)
            axis.plot(*zip(*((steps, value) for steps, values in points for value in values), strict=True), "k.", ms=3)
        axis.set(xlabel="steps", title=title, xscale="log")
        axis.set_xticks(list(found), [str(steps) for steps in found])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    axes[0].set_yscale("log")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
