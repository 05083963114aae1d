"""The noise of the next iteration is made while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

Inputs = dict[str, Tensor]


class NoiseAhead:
    """``make(i)`` for i = first, first + 1, ...; one thread is one iteration ahead. A context manager."""

    def __init__(self, make: Callable[[int], Inputs], last: int) -> None:
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._next: tuple[int, Future[Inputs]] | None = None

    def __call__(self, iteration: int) -> Inputs:
        """What ``make(iteration)`` returns; ``iteration + 1`` is begun unless it is beyond the last."""
        ready, self._next = self._next, None
        if iteration + 1 < self._last:
            self._next = iteration + 1, self._thread.submit(self._make, iteration + 1)
        return ready[1].result() if ready and ready[0] == iteration else self._make(iteration)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
