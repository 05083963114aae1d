"""Ctrl-C and SIGTERM wait until the iteration, or of a lone process the batch in work, is done, and the state saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# mmd_export.supervisor passes on what a process group has got already, and cannot tell a group's signal from its own.
ONE_SIGNAL = 0.5  # seconds


class StoppedError(KeyboardInterrupt):
    """A signal was seen at a place where the state is that of whole iterations."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that nothing stays half made. Inert off the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupts:
    """Remembers the first SIGINT or SIGTERM in ``pending``. Inert off the main thread.

    The second one stops at once, unless it comes within ``ONE_SIGNAL`` of the first, which is the same signal once
    more; and not if ``patient``: torchrun passes a Ctrl-C on that the terminal has sent already.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.pending = False
        self._patient = patient
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def give_way(self) -> None:
        """Raise StoppedError if a signal has come; not if ``patient``: other processes would wait for this one."""
        if self.pending and not self._patient:
            raise StoppedError

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._remember) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if not self.pending:
            self._first, self.pending = time.monotonic(), True  # in this order: a handler may be interrupted
        elif not self._patient and time.monotonic() - self._first >= ONE_SIGNAL:
            raise KeyboardInterrupt
