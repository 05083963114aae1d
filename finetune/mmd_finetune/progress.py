"""The observer of the command line: loss, held-out distance and the time left, on stderr.

A bar on a terminal or in a notebook; elsewhere a line every half minute, so that a log shows a long run alive.
"""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmd_finetune.loop import Report
from mmd_finetune.run_folder import form_of
from mmd_finetune.world import is_first_process

BAR = (8, 40)  # columns, at least and at most
NUMBERS = 72  # columns that all but the bar takes
LINE_INTERVAL = 30.0  # seconds between lines where there is no bar
PACE_OVER = 600.0  # seconds; rich's 30 hold few iterations, of which one with an evaluation takes many times as long


class ProgressBar:
    """``with ProgressBar() as observer: tune(settings, observer=observer)``. The first process shows it.

    It appears with the first report, so that nothing stands before the error of a run that is refused.
    """

    def __init__(self, console: Console | None = None) -> None:
        shown = console or Console(stderr=True, quiet=not is_first_process())
        least, most = BAR
        self._bar = Progress(
            BarColumn(bar_width=max(least, min(most, shown.width - NUMBERS))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=shown,
            speed_estimate_period=PACE_OVER,
        )
        self._task = self._bar.add_task("tuning", total=None, measured="")
        self._said = monotonic()

    def __call__(self, report: Report) -> None:
        """Show one iteration."""
        held_out, best = (f"{distance:{form_of(distance)}}" for distance in (report.held_out, report.best))
        measured = f"held-out {held_out}, best {best}"
        if report.loss is not None:
            measured = f"MMD² {report.loss:.4f}, {measured}"
        self._bar.start()
        self._bar.update(self._task, completed=report.iteration, total=report.iterations, measured=measured)
        shown = self._bar.console
        if not (shown.is_terminal or shown.is_jupyter) and monotonic() - self._said >= LINE_INTERVAL:
            self._said = monotonic()
            left = self._bar.tasks[0].time_remaining
            when = "" if left is None else f", {timedelta(seconds=round(left))} left"
            line = f"mmd-export: iteration {report.iteration} of {report.iterations}: {measured}{when}"
            shown.print(line, soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:  # stopping one that never was prints an empty line
            self._bar.stop()
