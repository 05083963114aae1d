"""Results that take long, cell by cell: what is measured is written at once, and a second run goes on behind it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment


class CellFile:
    """The cells of one result file: ``{key: {"settings": ..., "where": ..., results}}``.

    Args:
        path: the JSON file; what it holds is kept.
        script: the script's name for the file.
        facts: what holds for all cells, written beside them.
    """

    def __init__(self, path: Path, script: str, facts: Mapping[str, Any]) -> None:
        self.path, self.script, self.facts = path, script, dict(facts)
        self.cells = self._read()

    def measure(self, key: str, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell ``key``: from the file if it was measured with these settings, else from ``work``."""
        settings = json.loads(json.dumps(dict(settings)))
        self.cells = self._read()  # other processes may have measured it meanwhile
        cell = self.cells.get(key)
        if cell is not None and cell["settings"] == settings:
            return cell
        found = {"settings": settings, **work(), "where": where()}
        self._write(key, found)
        shown = {name: value for name, value in self.cells[key].items() if name not in ("settings", "where")}
        print(key, shown, flush=True)
        return self.cells[key]

    def _read(self) -> dict[str, dict[str, Any]]:
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        cells: dict[str, dict[str, Any]] = known.get("cells", {})
        return cells

    def _write(self, key: str, found: dict[str, Any]) -> None:
        """One more cell, beside those that other processes have measured meanwhile."""
        with self._alone():
            self.cells = self._read() | {key: found}
            values = {"script": self.script, "environment": environment(), **self.facts, "cells": self.cells}
            partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
            partial.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(self.path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes the file; Windows and file systems without locks do not keep them apart.

        The lock is on a file beside it, which stays: the file itself is another one after each ``replace``.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("wb") as lock:
            if os.name != "nt":
                import fcntl

                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits for a folder's name, so that other settings get another folder."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]


def where() -> dict[str, Any]:
    """The machine of one cell in short: cells of a file may come from several."""
    described = environment()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else described["cpu"]
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
