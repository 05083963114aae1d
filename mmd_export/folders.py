"""Folders and files that appear complete or not at all: written beside their place, then renamed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, BinaryIO

from mmd_export.errors import MmdExportError, UsageError
from mmd_export.journal import temporary


def require_absent(out: Path) -> None:
    """Raise ``UsageError`` if something stands at ``out``."""
    if os.path.lexists(out):
        raise UsageError(f"{out} already exists; choose another --out or pass --overwrite")


@contextmanager
def staged_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new empty folder beside ``out`` that takes its place when the block ends well, and vanishes otherwise.

    What a killed process left beside ``out`` is cleared first. With ``replace`` the old folder stays until then.
    """
    place = out.absolute()
    partial = _beside(place, "partial")
    with temporary(partial):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            clear_stale(place)
            if not replace:
                require_absent(place)
            partial.mkdir()
            yield partial
            _sync_tree(partial)
            _publish(partial, place, replace)
        except OSError as error:
            raise MmdExportError(_os_error_line(error, place, partial)) from error


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file that takes its place when the block ends well, and vanishes otherwise."""
    place = path.absolute()
    partial = _beside(place, "partial")
    with temporary(partial):
        place.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        try:
            partial.replace(place)
        except OSError:
            if not place.is_file():
                raise
            shutil.copyfile(partial, place)


@contextmanager
def output_place(path: Path) -> Iterator[Path]:
    """The same for a file of results. A pipe, a device or a link is written to as it is, not replaced by a file.

    So is a file whose folder takes no new ones. One that cannot be renamed over, such as a mounted one, is copied over.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        yield path
    elif path.exists() and why_nothing_is_made(path.absolute().parent):
        yield path
    else:
        with staged_file(path) as partial:
            yield partial


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """The same, open; MmdExportError where the disk refuses."""
    try:
        with output_place(path) as place, place.open("wb") as file:
            yield file
    except OSError as error:
        raise MmdExportError(f"cannot write {path}: {error.strerror or error}; free the cause and run again") from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder for what is needed in between only, gone after the block."""
    with TemporaryDirectory() as name, temporary(Path(name)):
        yield Path(name)


def clear_stale(place: Path) -> None:
    """Remove what killed processes left beside ``place``; put back a folder that was being replaced."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(partial|retired)-(\d{{1,9}})")
    for entry in sorted(place.parent.iterdir()):
        found = pattern.fullmatch(entry.name)
        if found is None or _is_alive(int(found[2])):
            continue
        if found[1] == "retired" and not os.path.lexists(place):
            entry.rename(place)
        else:
            shutil.rmtree(entry)


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{kind}-{os.getpid()}")


def _is_alive(pid: int) -> bool:
    """Whether another process of that number runs; on Windows, where this cannot be asked harmlessly, always."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: Path, place: Path, replace: bool) -> None:
    """Rename into place. After an exchange ``partial`` holds the old folder, which the caller removes."""
    if not os.path.lexists(place):
        partial.rename(place)
    elif not replace:
        require_absent(place)
    elif not _exchange(partial, place):
        retired = _beside(place, "retired")
        place.rename(retired)
        try:
            partial.rename(place)
        except BaseException:
            retired.rename(place)
            raise
        shutil.rmtree(retired)
    sync(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once where the system can: renameat2(2) with RENAME_EXCHANGE, Linux 3.15, glibc 2.28."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Push to the disk; Windows can do that neither for folders nor for files opened to read."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_line(error: OSError, place: Path, partial: Path) -> str:
    """What failed and where, with names that the user knows."""
    reason = error.strerror or str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    at = f" (at {name.replace(str(partial), str(place))})" if name else ""
    return f"cannot write {place}{at}: {reason}; nothing was left behind, free the cause and run again"


def write_text(path: Path, text: str, flag: str = "") -> None:
    """A text file that appears complete or not at all; ``flag`` is the option that named it."""
    try:
        with output_place(path) as place:
            place.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror or error}".strip()) from error


def read_object(path: Path, flag: str, advice: str) -> dict[str, Any]:
    """A JSON object; UsageError names ``flag``, the option that named the file, and ends in ``advice``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{flag} {path} is no JSON: {error}; {advice}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{flag} {path} holds a {type(data).__name__}, an object is expected; {advice}")
    return data


def require_writable(out: Path) -> None:
    """Raise ``UsageError`` if nothing can be made at ``out``: the nearest folder above it is tried."""
    place = out.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"--out {out} cannot be made: {place} is no folder; choose another --out")
    if reason := why_nothing_is_made(place):
        raise UsageError(f"--out {out} cannot be written: {place}: {reason}; choose another --out")


def why_nothing_is_made(folder: Path) -> str:
    """Why nothing new can stand in ``folder``, "" if something can: it is tried, its rights are not believed.

    A superuser has all rights and still cannot write into /proc or onto a disk that is mounted read-only.
    """
    try:
        Path(mkdtemp(prefix=".", dir=folder)).rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return ""
