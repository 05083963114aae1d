"""Files of results appear complete or not at all; a device, a pipe and what a link leads to are written as they are."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmd_export.cli_output import write_json
from mmd_export.commands.demo import draw_picture
from mmd_export.errors import MmdExportError
from mmd_export.folders import write_text
from mmd_export.pictures import save_grid
from mmd_finetune.metrics.picture import draw_metrics

OLD = b"as it was"
IMAGES = np.zeros((36, 1, 8, 8), np.float32)
SCORED = {"source": "digits", "count": 4, "metrics": {"pixels": {"frechet": {"value": 1.0, "low": None, "high": None}}}}


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk: half of a text, or of a picture, and then no more."""

    def text(self: Path, _: str, **__: Any) -> int:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def picture(_: Figure, file: BinaryIO, **__: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", text)
    monkeypatch.setattr(Figure, "savefig", picture)


def numbers(place: Path) -> None:
    write_json(place, {"a": 1})


def values(place: Path) -> None:
    draw_metrics(SCORED, place)


def digits(place: Path) -> None:
    draw_picture({"untuned": IMAGES, "tuned": IMAGES}, {}, place)


def sheet(place: Path) -> None:
    save_grid(IMAGES, place)


@pytest.mark.parametrize("write", [numbers, values, digits])
def test_a_full_disk_leaves_the_old_file(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_bytes(OLD)
    fill(monkeypatch)
    with pytest.raises(MmdExportError, match="No space left on device"):
        write(place)
    assert place.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("write", [values, digits, sheet])
def test_a_picture_is_a_png_whatever_its_name(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "file")
    with Image.open(tmp_path / "file") as picture:
        assert picture.format == "PNG"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipe has a name here")
@pytest.mark.parametrize("write", [numbers, values, sheet, partial(write_text, text="text")])
def test_a_pipe_with_a_name_stays_one(write: Callable[[Path], None], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(timeout=10)
    assert read, "nothing was written into the pipe"
    assert read[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_stays_one(tmp_path: Path) -> None:
    """As /dev/stdout is, which leads to a file where the shell says so."""
    link, place = tmp_path / "link", tmp_path / "folder" / "there.json"
    link.symlink_to(place)
    for value in ({"a": 1}, {}):
        write_json(link, value)
        assert link.is_symlink()
        assert json.loads(place.read_text()) == value


def test_a_file_that_cannot_be_renamed_over_is_copied_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that is mounted alone, as containers do."""

    def busy(self: Path, target: Path) -> Path:
        raise OSError(16, "Device or resource busy", str(self), str(target))

    monkeypatch.setattr(Path, "replace", busy)
    place = tmp_path / "file"
    with pytest.raises(MmdExportError, match="busy"):
        numbers(place)
    place.write_bytes(OLD)
    numbers(place)
    assert json.loads(place.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="no file here whose folder takes no others")
def test_a_file_in_a_folder_that_takes_no_other_is_written_where_it_is() -> None:
    place = Path("/proc/self/oom_score_adj")
    kept = place.read_text()
    write_text(place, kept)
    assert place.read_text() == kept
