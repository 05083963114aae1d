"""The bar of the command line."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mmd_finetune.loop import Report
from mmd_finetune.progress import ProgressBar


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize(
    ("held_out", "best", "shown_as"),
    [(102.6, 100.59, ("102.60", "100.59")), (0.0004567, 0.0001234, ("0.000457", "0.000123"))],
)
def test_no_number_of_the_bar_is_cut_off(
    held_out: float, best: float, shown_as: tuple[str, str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmd_finetune.progress.LINE_INTERVAL", 0.0)
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    with ProgressBar(console) as bar:
        bar(Report(iteration=1200, iterations=1200, loss=-0.0001, held_out=held_out, best=best, seconds=4000.0))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert "iteration 1200" not in shown
    for number in ("1200/1200", "MMD² -0.0001", f"held-out {shown_as[0]}", f"best {shown_as[1]}", "left"):
        assert number in shown


def test_nothing_is_shown_before_the_first_report() -> None:
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(ValueError, match="refused"), ProgressBar(console):
        raise ValueError("refused")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 31.0, 31.5, 40.0])
    monkeypatch.setattr("mmd_finetune.progress.monotonic", lambda: next(clock, 41.0))
    console = Console(file=io.StringIO(), width=40)
    with ProgressBar(console) as bar:
        for iteration in (1, 2, 3):
            bar(Report(iteration=iteration, iterations=9, loss=None, held_out=2.0, best=1.5, seconds=4.0))
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("mmd-export: iteration")]
    assert len(lines) == 1
    assert re.fullmatch(r"mmd-export: iteration 2 of 9: held-out 2\.00, best 1\.50, \d:\d\d:\d\d left", lines[0])


def test_one_long_iteration_does_not_rule_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten iterations took 60 seconds, 51 of them the last, which held an evaluation; ten are left."""
    now = [0.0]
    console = Console(file=io.StringIO(), width=80, get_time=lambda: now[0])
    with ProgressBar(console) as bar:
        for iteration in range(1, 11):
            now[0] = iteration - 1.0 if iteration < 10 else 60.0
            monkeypatch.setattr("mmd_finetune.progress.LINE_INTERVAL", 0.0 if iteration == 10 else 1e9)
            bar(Report(iteration=iteration, iterations=20, loss=None, held_out=2.0, best=1.5, seconds=now[0]))
    assert isinstance(console.file, io.StringIO)
    (left,) = re.findall(r"0:0(\d:\d\d) left", console.file.getvalue())
    assert "1:00" <= left <= "1:10"
