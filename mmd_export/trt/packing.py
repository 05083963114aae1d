"""Engines packed with xz, as ``--compress`` stores them: a good part of an engine is code. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

_PRESET = 1  # of xz: higher ones take longer and save next to nothing, as weights do not pack


def pack(engine: Path, packed: Path) -> None:
    """Replace ``engine`` by ``packed``, an .xz file; the same bytes give the same bytes."""
    import lzma  # not every build of Python has it

    with engine.open("rb") as source, lzma.open(packed, "wb", preset=_PRESET) as goal:
        shutil.copyfileobj(source, goal, 2**22)
    engine.unlink()


def read_engine(path: Path) -> bytes:
    """The engine in a file, packed or not."""
    if path.suffix != ".xz":
        return path.read_bytes()
    import lzma

    with lzma.open(path) as source:
        return source.read()
