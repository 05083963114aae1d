"""Rows of a result file that are measured one by one, so that a stopped benchmark goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import write_result
from benchmarks.digits_quality import CONFIG
from mmd_finetune.loop import tune
from mmd_finetune.progress import ProgressBar
from mmd_finetune.run_folder import RunResult
from mmd_finetune.settings import FinetuneSettings, make_settings


class Rows:
    """The rows of one JSON file, each told apart by ``key``; written after every new one.

    Args:
        path: the result file.
        script: its name, for the file.
        key: the fields that make a row what it is.
        facts: what stands beside the rows, from all of them.
    """

    def __init__(
        self,
        path: Path,
        script: str,
        key: tuple[str, ...],
        facts: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    ) -> None:
        self.path, self.script, self.key, self.facts = path, script, key, facts
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The row with these values, if it was measured."""
        return next((row for row in self.rows if all(row[name] == value for name, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """One more row; the file is written in the order of the keys."""
        self.rows.append(row)
        self.rows.sort(key=lambda each: [str(each[name]) for name in self.key])
        write_result(self.path, self.script, {"rows": self.rows, **self.facts(self.rows)})
        print(row, flush=True)


def digits_settings(out: Path, seed: int, **values: Any) -> FinetuneSettings:
    """The settings of ``finetune/configs/digits.toml`` with others in the place of some."""
    return make_settings({"out": out, "seed": seed, "device": "cpu", **values}, CONFIG)


def tuned(settings: FinetuneSettings) -> tuple[RunResult, float]:
    """A run, continued if it was stopped; and its seconds, over all parts."""
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ProgressBar() as observer:
        result = tune(settings, resume=True, observer=observer)
    return result, max(result.seconds, round(time.perf_counter() - start, 1))


@contextmanager
def run_folders(given: Path | None) -> Iterator[Path]:
    """Where runs are kept: ``given``, to go on after a stop, or a folder that vanishes."""
    if given is not None:
        yield given
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)
