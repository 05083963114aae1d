"""Child processes that start in no time: forked from a server that has already imported torch and diffusers.

All children of one server hash strings alike; what must not depend on that is compared with another process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from mmd_export.errors import MmdExportError
from mmd_finetune.loop import Report, tune
from mmd_finetune.settings import FinetuneSettings

_CONTEXT = multiprocessing.get_context("forkserver")
if sys.platform != "darwin":  # its frameworks may not be forked
    _CONTEXT.set_forkserver_preload(["torch", "diffusers.models.unets.unet_2d", "mmd_finetune.loop"])


class Child:
    """``work(say, *arguments)`` in a process with our environment and ``given``; what it says is ``heard``.

    A traceback of it is on the standard error of the tests.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, given: Mapping[str, str] | None = None) -> None:
        self.heard: list[Any] = []
        self._ear, mouth = _CONTEXT.Pipe(duplex=False)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(given or {})}
        self.process: BaseProcess = _CONTEXT.Process(
            target=_do, args=(work, mouth, environment, arguments), daemon=True
        )
        self.process.start()
        mouth.close()

    def listen(self, seconds: float = 60.0) -> bool:
        """Wait for one more word; False once the process is over. TimeoutError, and its end, if nothing comes."""
        if not self._ear.poll(max(seconds, 0.0)):
            self.process.kill()
            raise TimeoutError(f"said {self.heard} and then nothing for {seconds:.0f} seconds")
        try:
            self.heard.append(self._ear.recv())
        except EOFError:
            return False
        return True

    def end(self, seconds: float = 60.0) -> int | None:
        """Its exit code once it is over, negative for a signal. TimeoutError, and its end, if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.listen(deadline - time.monotonic()):
            pass
        self.process.join()
        return self.process.exitcode


def _do(
    work: Callable[..., None], mouth: Connection, environment: Mapping[str, str], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(mouth.send, *arguments)


def tuning(say: Callable[[int], None], settings: FinetuneSettings) -> None:
    """Begin or go on, and say every iteration."""

    def observe(report: Report) -> None:
        say(report.iteration)

    tune(settings, resume=True, observer=observe)


def tuning_on_a_small_disk(say: Callable[[str], None], settings: FinetuneSettings) -> None:
    """The same where no file may have more than 20,000 bytes; says the error."""
    import resource

    sys.dont_write_bytecode = True  # it would be cut off, and stay
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        tune(settings, resume=True)
    except MmdExportError as error:
        say(str(error))
        sys.exit(error.exit_code)
