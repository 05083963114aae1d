"""Errors that a user can act on, each with the exit code of the command line."""

from __future__ import annotations

import re
from typing import ClassVar

# std::bad_alloc, torch (CPU, CUDA), ONNX Runtime and OpenVINO, in their own words.
_OUT_OF_MEMORY = re.compile(r"bad.?alloc|out of memory|can't alloc|(cannot|failed to) allocate memory", re.IGNORECASE)


class MmdExportError(Exception):
    """What is wrong, where, both values and the next move, in one line."""

    exit_code: ClassVar[int] = 1


class UsageError(MmdExportError):
    """A wrong option, an unknown name, an input file that cannot serve."""

    exit_code: ClassVar[int] = 2


class UndefinedError(UsageError):
    """These images leave one metric undefined; nothing is wrong with the others."""


class NotAvailableError(MmdExportError):
    """Not available on this machine, or not supported by the target."""

    exit_code: ClassVar[int] = 3


class ParityError(MmdExportError):
    """The artefact does not compute what the reference computes."""

    exit_code: ClassVar[int] = 4


class BundleError(MmdExportError):
    """The bundle is damaged or cannot be trusted."""

    exit_code: ClassVar[int] = 5


class LatencyGateError(MmdExportError):
    """Slower than the gate allows."""

    exit_code: ClassVar[int] = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that memory ran out."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, MemoryError) or _OUT_OF_MEMORY.search(str(at)):
            return True
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return False


def one_line(error: BaseException) -> str:
    """The message of a foreign library in one line of at most 300 characters, or the kind of error."""
    return " ".join(str(error).split())[:300] or type(error).__name__
