"""The studies of benchmarks/: cells are measured once and kept, verdicts and tables follow them."""

from __future__ import annotations

import json
import os
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mmd_ablation
from benchmarks.budget_tables import (
    ablation_rows,
    beats_the_paper,
    budget_rows,
    draw_budgets,
    keeps_real_recall,
    keeps_recall,
    reaches,
    target_rows,
)
from benchmarks.cells import CellFile, digest


def cell(distance: float, recall: float = 0.5) -> dict[str, Any]:
    copies = {"memorisation": {"value": 0.5}, "copying": {"value": -0.1}}
    recalls = {"recall": recall, "half_recall": recall / 2}
    return {"held_out_distance": distance, "loss_encoder_distance": distance / 2, **recalls, **copies}


CELLS = {
    "untuned/20": cell(0.4, 0.6), "untuned/50": cell(0.3), "untuned/5": cell(2.0), "paper/5/0": cell(1.0, 0.3),
    "ours/5/0": cell(0.2, 0.7), "ours/5/1": cell(0.35, 0.65), "ours/3/0": cell(0.39, 0.61),
}  # fmt: skip


def test_a_cell_is_measured_once_and_again_with_other_settings(tmp_path: Path) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    path = tmp_path / "deep" / "cells.json"
    assert CellFile(path, "script", {"draws": 5}).measure("a", {"k": (1, 2)}, work)["value"] == 1
    assert CellFile(path, "script", {"draws": 5}).measure("a", {"k": (1, 2)}, work)["value"] == 1
    assert CellFile(path, "script", {"draws": 5}).measure("b", {"k": (1, 2)}, work)["value"] == 2
    assert CellFile(path, "script", {"draws": 5}).measure("a", {"k": (1, 3)}, work)["value"] == 3
    written = json.loads(path.read_text())
    assert (written["script"], written["draws"], set(written["cells"])) == ("script", 5, {"a", "b"})
    assert {"device", "threads", "torch"} <= set(written["cells"]["a"]["where"])
    assert {entry.name for entry in path.parent.iterdir()} == {"cells.json", ".cells.json.lock"}


def test_what_another_process_has_measured_is_not_measured_again(tmp_path: Path) -> None:
    one, other = (CellFile(tmp_path / "cells.json", "script", {}) for _ in range(2))
    other.measure("a", {}, lambda: {"value": 1})
    assert one.measure("a", {}, lambda: pytest.fail("it was measured again"))["value"] == 1


@pytest.mark.skipif(os.name == "nt", reason="no flock on Windows")
def test_two_that_write_at_once_lose_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (CellFile(tmp_path / "cells.json", "script", {}) for _ in range(2))
    writer = threading.Thread(target=other.measure, args=("b", {}, lambda: {"value": 2}))
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if writer.ident is None:  # the first has read the file and is about to replace it
            writer.start()
            writer.join(0.2)
        return real(self, target)

    monkeypatch.setattr("benchmarks.cells.environment", lambda: {"cpu": "this one"})
    monkeypatch.setattr(Path, "replace", replace)
    one.measure("a", {}, lambda: {"value": 1})
    writer.join()
    assert set(json.loads((tmp_path / "cells.json").read_text())["cells"]) == {"a", "b"}


def test_a_failing_cell_loses_no_other(tmp_path: Path) -> None:
    file = CellFile(tmp_path / "cells.json", "script", {})
    file.measure("a", {}, lambda: {"value": 1})

    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.measure("b", {}, fail)
    assert set(json.loads((tmp_path / "cells.json").read_text())["cells"]) == {"a"}


def test_a_digest_is_that_of_the_values() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_the_worst_seed_decides() -> None:
    assert reaches(CELLS, 5, 20) is True
    assert reaches(CELLS, 5, 50) is False  # seed 1 misses
    assert reaches(CELLS, 10, 50) is None
    assert reaches({key: cell for key, cell in CELLS.items() if key != "untuned/50"}, 5, 50) is None


def test_the_paper_is_beaten_only_where_both_were_measured() -> None:
    assert beats_the_paper(CELLS) is True
    assert beats_the_paper(CELLS | {"paper/5/1": cell(0.3)}) is False
    assert beats_the_paper({"ours/5/0": cell(0.2)}) is None


def test_recall_is_kept_by_every_budget() -> None:
    assert keeps_recall(CELLS, 20) is True
    assert keeps_recall(CELLS | {"ours/2/0": cell(0.5, 0.59)}, 20) is False
    assert keeps_recall(CELLS, 10) is None


def test_rows_are_ordered_by_budget_and_show_the_seeds() -> None:
    heads, rows = budget_rows({"cells": CELLS})
    assert [row[0] for row in rows] == [
        "3, ours", "5, untuned", "5, the paper's recipe", "5, ours", "20, untuned", "50, untuned",
    ]  # fmt: skip
    _, (without,) = budget_rows({"cells": {"untuned/1": cell(99.0) | {"copying": None}}})
    assert without == ("1, untuned", "1", "99.000", "49.500", "0.500", "0.250", "0.500", "")
    assert rows[3][1:4] == ("2", "0.200 to 0.350", "0.100 to 0.175")
    assert all(len(row) == len(heads) for row in rows)
    assert [row[1] for row in target_rows({"cells": CELLS}, ((5, 20), (5, 50), (2, 20)))[1]] == [
        "yes", "no", "not measured", "yes", "yes", "not measured",
    ]  # fmt: skip
    assert [row[1] for row in target_rows({"cells": {}}, ((5, 20),))[1]] == ["not measured"] * 4


def test_real_images_are_the_last_row_and_bound_the_recall() -> None:
    cells = CELLS | {"real": {"half_recall": 0.3}}
    heads, rows = budget_rows({"cells": cells})
    assert rows[-1] == ("real, one half in the other", "", "", "", "", "0.300", "", "")
    assert len(rows[-1]) == len(heads)
    assert keeps_real_recall(cells) is True
    assert keeps_real_recall(cells | {"ours/2/0": cell(0.5, 0.59)}) is False
    assert keeps_real_recall({"real": {"half_recall": 0.3}}) is None


def test_the_ablation_puts_the_best_first() -> None:
    cells = {"cubic/default/default/256/0": cell(0.5), "gaussian/default/default/256/0": cell(0.4)}
    heads, rows = ablation_rows({"cells": cells})
    assert [row[0] for row in rows] == ["gaussian", "cubic"]
    assert all(len(row) == len(heads) for row in rows)


def test_a_star_leaves_the_config_along_one_axis_at_a_time() -> None:
    axes: dict[str, Any] = {"kernels": ["gaussian", "energy"], "estimators": ["unbiased", "biased"]}
    axes |= {"references": ["bank"], "batches": [256, 512], "seeds": [0]}
    star, full = (
        [key for key, _ in mmd_ablation.cells(Namespace(design=design, **axes))] for design in ("star", "full")
    )
    assert sorted(star) == [
        "energy/unbiased/bank/256/0", "gaussian/biased/bank/256/0", "gaussian/unbiased/bank/256/0",
        "gaussian/unbiased/bank/512/0",
    ]  # fmt: skip
    assert len(full) == 8
    assert set(star) <= set(full)


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw_budgets({"cells": CELLS}, tmp_path / "a" / "budgets.png")
    assert (tmp_path / "a" / "budgets.png").read_bytes().startswith(b"\x89PNG")
