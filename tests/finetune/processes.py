"""Processes that start at once: forked from one that has imported torch and diffusers, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from diffusers import UNet2DModel

from mmd_export.errors import MmdExportError
from mmd_finetune.loop import Report, tune
from mmd_finetune.settings import FinetuneSettings

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])
_ = UNet2DModel  # diffusers imports it when it is asked for


class Child:
    """``work(say, *arguments)`` in a process with the environment ``given``; what it says is ``heard``."""

    def __init__(self, work: Callable[..., None], *arguments: Any, given: Mapping[str, str] | None = None) -> None:
        self.heard: list[Any] = []
        self._ear, mouth = _SERVER.Pipe(duplex=False)
        self.process: BaseProcess = _SERVER.Process(target=_do, args=(work, mouth, given or {}, arguments))
        self.process.start()
        mouth.close()

    def listen(self) -> bool:
        """Wait for one more word; False once the process is over."""
        try:
            self.heard.append(self._ear.recv())
        except EOFError:
            return False
        return True

    def end(self, seconds: float = 60.0) -> int | None:
        """Wait until it is over: its exit code, negative for a signal."""
        while self.listen():
            pass
        self.process.join(seconds)
        return self.process.exitcode


def _do(work: Callable[..., None], mouth: Connection, given: Mapping[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.update(given)
    torch.set_num_threads(1)
    work(mouth.send, *arguments)


def tuning(say: Callable[[int], None], settings: FinetuneSettings) -> None:
    """Begin or go on, and say every iteration."""

    def observe(report: Report) -> None:
        say(report.iteration)

    tune(settings, resume=True, observer=observe)


def tuning_on_a_small_disk(say: Callable[[str], None], settings: FinetuneSettings) -> None:
    """The same where no file may have more than 20,000 bytes; says the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        tune(settings, resume=True)
    except MmdExportError as error:
        say(str(error))
        sys.exit(error.exit_code)
