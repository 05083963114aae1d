"""Files that are whole or absent, and one clear line when the disk refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmd_export.errors import MmdExportError
from mmd_export.folders import sync
from mmd_export.journal import temporary


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside ``path``, sync, rename: after a crash ``path`` holds the old bytes or the new ones."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write one cache file
    with temporary(partial.absolute()):
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """One more line of a JSONL file."""
    with path.open("ab") as file:
        file.write((json.dumps(value) + "\n").encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def clear_write_errors(run: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turn a refused write into one line that says where, why, and what is ``kept`` then."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MmdExportError(f"cannot write the run folder {run}: {reason}; {kept()}") from error
