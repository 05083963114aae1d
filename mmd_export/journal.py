"""What a command notes for the process that waits for it: the last it said, and what must not outlive it.

A crash or a kill runs no ``finally``; whoever waits reads the notes then. Where nobody waits they are dropped. The
notes are JSON lines in a file that has no name; behind them stands Python's own trace of a crash.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CULPRIT = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)


@dataclass
class Journal:
    """Open in a process that another one waits for."""

    descriptor: int | None = None

    def open(self, descriptor: int) -> None:
        """Note from now on; a crash writes its trace too, unless the user wants it elsewhere."""
        self.descriptor = descriptor
        if not faulthandler.is_enabled():
            faulthandler.enable(descriptor)

    def end(self, code: int) -> None:
        """The command is done and its output written; what crashes now are libraries on their way out."""
        if self.descriptor is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(AttributeError, OSError, ValueError):  # closed; Python says so when it ends
                    stream.flush()
            self.note(ended=code)

    def note(self, **facts: str | int) -> None:
        """One line. What cannot be written, as on a full disk where the notes are not in memory, is left out."""
        if self.descriptor is not None:
            with suppress(OSError):
                os.write(self.descriptor, f"{json.dumps(facts)}\n".encode())


# Of the process, as the signals are that end it: whoever makes a file, however deep, can say so.
JOURNAL = Journal()


def nameless_file() -> int:
    """A descriptor of an empty file that is gone when nobody has it open; in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmd-export")
    descriptor, name = tempfile.mkstemp()
    Path(name).unlink()
    return descriptor


@contextmanager
def temporary(path: Path) -> Iterator[None]:
    """A file or folder that is gone after the block, however it ends; an absolute path."""
    JOURNAL.note(made=str(path))
    try:
        yield
    finally:
        remove(path)
        JOURNAL.note(gone=str(path))


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Notes:
    """``ended``: the command's own exit code, once it is done. ``left``: what was made and is not gone.

    ``trace``: of a crash, as faulthandler writes it.
    """

    said: str
    ended: int | None
    left: tuple[Path, ...]
    trace: str

    @classmethod
    def read(cls, descriptor: int) -> Notes:
        """All that was noted."""
        said, ended, left, trace = "", None, dict[str, None](), []
        for line in _text(descriptor).splitlines(keepends=True):
            try:
                facts = json.loads(line)
            except ValueError:
                trace.append(line)
                continue
            said, ended = facts.get("said", said), facts.get("ended", ended)
            left |= {path: None for path in (facts.get("made"),) if path}
            left.pop(facts.get("gone"), None)
        return cls(said, ended, tuple(map(Path, left)), "".join(trace))

    @property
    def culprit(self) -> str:
        """The innermost line of Python, ``onnx/shape_inference.py:46 infer_shapes``: it called what crashed."""
        found = _CULPRIT.search(self.trace.partition("Current thread")[2]) or _CULPRIT.search(self.trace)
        return f"{'/'.join(Path(found[1]).parts[-2:])}:{found[2]} {found[3]}" if found else ""


def _text(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().decode("utf-8", errors="replace")
