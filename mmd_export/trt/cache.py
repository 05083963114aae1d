"""Finished engines by what went into them, and timing caches; in the user's cache folder, or in ``--cache``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmd_export.folders import staged_file

VARIABLE = "MMD_EXPORT_CACHE"
ENGINES = "engines"


def cache_folder(given: Path | None, kind: str = ENGINES) -> Path:
    """``--cache``, else MMD_EXPORT_CACHE, else where programs of this system keep what can be made again.

    Engines lie in MMD_EXPORT_CACHE itself, other kinds in a folder of that name there.
    """
    if given is not None:
        return given
    if named := os.environ.get(VARIABLE):
        return Path(named) if kind == ENGINES else Path(named) / kind
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mmd-export" / kind


def sha256_of(files: Iterable[Path]) -> str:
    """One hash of files in order; of a single file its own."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                whole.update(block)
    return whole.hexdigest()


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of an engine: the SHA-256 of everything that its bytes depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def find(folder: Path, key: str, engine: Path) -> dict[str, Any] | None:
    """Copy the engine of ``key`` to ``engine``; returns what the library said of it, None if it is not whole."""
    stored, facts = folder / f"{key}.engine", folder / f"{key}.json"
    try:
        said: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        shutil.copyfile(stored, engine)
    except (OSError, ValueError):
        return None
    if said.pop("sha256", None) != sha256_of([engine]):
        engine.unlink()
        return None
    return said


def store(folder: Path, key: str, engine: Path, said: Mapping[str, Any]) -> None:
    """Keep an engine; a reader sees all of it or nothing."""
    _place(folder / f"{key}.engine", engine.read_bytes())
    facts = json.dumps({**said, "sha256": sha256_of([engine])}, sort_keys=True)
    _place(folder / f"{key}.json", facts.encode())


def _place(path: Path, data: bytes) -> None:
    with staged_file(path) as partial:
        partial.write_bytes(data)
