"""TensorBoard events of a run, made from its log: what TensorBoard shows is what ``log.jsonl`` holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mmd_export.errors import NotAvailableError
from mmd_finetune.curve import scalars
from mmd_finetune.loop import Observer, Report

FOLDER = "tensorboard"
SHEETS = ("before", "after")


class TensorBoard:
    """``with TensorBoard(settings.out, bar) as observer: tune(settings, observer=observer)``.

    Writes to ``tensorboard/`` in the run folder ``place``, and passes every report on to the observer ``then``. A
    resumed run begins the curves anew from the whole log, so a kill leaves no gap and nothing twice.
    """

    def __init__(self, place: Path, then: Observer = lambda _: None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NotAvailableError(
                f"--tensorboard needs tensorboard ({error}); pip install 'mmd-export[finetune]'"
            ) from error
        self._make, self._place, self._then, self._read = SummaryWriter, place, then, 0
        self._writer: SummaryWriter | None = None

    def __call__(self, report: Report) -> None:
        """Bring the events up to the newest line of the log."""
        self._follow()
        self._then(report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is None and (kind is not None or not (self._place / "log.jsonl").is_file()):
            return  # nothing ran; a run that was finished before still gets its pictures
        self._follow()
        assert self._writer is not None
        for name in SHEETS:
            if (path := self._place / f"{name}.png").is_file():
                self._writer.add_image(name, _pixels(path), dataformats="HWC")
        self._writer.close()

    def _follow(self) -> None:
        if self._writer is None:  # not before the run has made its folder
            self._writer = self._make(str(self._place / FOLDER), purge_step=0)
        with (self._place / "log.jsonl").open("rb") as file:
            file.seek(self._read)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._read += len(text)
                line = json.loads(text)
                for name, value in scalars(line).items():
                    self._writer.add_scalar(name, value, line["iteration"])


def _pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The picture as uint8 (height, width, 3)."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
