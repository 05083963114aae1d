"""A command in a process of its own: the one that waits says how it ended when the command no longer can.

A compiler or a runtime may crash or take all memory, and no ``except`` sees that. Both processes are of one process
group and one terminal; exit codes and signals pass through.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO

from mmd_export.errors import NotAvailableError
from mmd_export.exit_codes import how_it_ended, signal_name
from mmd_export.journal import JOURNAL, Notes, nameless_file, remove

# All that compile or run foreign code; finetune saves its state at a signal and runs under torchrun.
COMMANDS = frozenset(
    ("demo", "build", "finalize", "embed", "verify", "bench", "report", "sample", "evaluate", "inspect", "doctor")
)
# Set by whoever waits, for a child that starts anew; a user's own value, such as 0, keeps the command in one process.
SUPERVISED = "MMD_EXPORT_SUPERVISED"
TRACEBACK = "MMD_EXPORT_TRACEBACK"
FORKS = sys.platform.startswith("linux")  # what macOS builds on, CoreFoundation, may not be used after a fork

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
_NOT_ASKED_FOR = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS", "SIGTRAP", "SIGXCPU")
_OTHER = {
    "build": ", another --target or --precision",
    **dict.fromkeys(("verify", "bench", "report", "sample", "evaluate"), ", another --runtime"),
}
_LESS = {
    "build": ", try a smaller --batch or --form loop",
    **dict.fromkeys(("sample", "evaluate"), ", try a smaller --count"),
}


def supervise(arguments: Sequence[str]) -> int | None:
    """The exit code of the command, which ran in a child; None in that child, and where nobody waits."""
    if (told := os.environ.pop(SUPERVISED, None)) is not None:
        parent, _, descriptor = told.partition(":")
        with suppress(ValueError, OSError):  # a value of the user's own
            os.set_inheritable(int(descriptor), False)
            _join(int(parent), int(descriptor))
        return None
    if not _can(arguments):
        return None
    try:
        journal = nameless_file()
    except OSError:  # no place for it; the command will say so if it needs one
        return None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _waited_for())
    try:
        child = _start(journal, before)
        return None if child is None else _judge(arguments[0], _wait(child), Notes.read(journal))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _can(arguments: Sequence[str]) -> bool:
    """Whether a child can take over: nothing has begun that it would share or repeat."""
    if os.name != "posix" or not arguments or arguments[0] not in COMMANDS or "LOCAL_RANK" in os.environ:
        return False
    if threading.active_count() > 1 or "torch" in sys.modules:
        return False
    return FORKS or (bool(sys.executable) and hasattr(sys.modules["__main__"], "__file__"))


def _start(journal: int, mask: Collection[int]) -> int | None:
    """The child, with ``mask`` of signals blocked; None in a forked one, and where there can be none."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    parent = os.getpid()
    of_child = signal.signal(signal.SIGCHLD, lambda *_: None)  # one that is ignored or left alone may never be pending
    os.set_inheritable(journal, not FORKS)
    told = {**os.environ, SUPERVISED: f"{parent}:{journal}"}
    try:
        if not FORKS:
            return os.posix_spawn(sys.executable, [sys.executable, *sys.orig_argv[1:]], told, setsigmask=mask)
        child = os.fork()
    except OSError:  # no more processes are to be had, so this one does it
        signal.signal(signal.SIGCHLD, of_child or signal.SIG_DFL)
        return None
    if child:
        return child
    signal.signal(signal.SIGCHLD, of_child or signal.SIG_DFL)
    _join(parent, journal)
    return None


def _join(parent: int, journal: int) -> None:
    """In the child: note what happens, and end when the parent does, even by kill -9."""
    JOURNAL.open(journal)
    if sys.platform.startswith("linux"):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    else:
        threading.Thread(target=_outlive_not, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _outlive_not(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Ending:
    """Exit code, negative for a signal, and the most memory that was taken."""

    code: int
    mebibytes: int


def _wait(child: int) -> _Ending:
    """Pass signals on until the child has ended."""
    while True:
        number, shared = _next_signal()
        if number != signal.SIGCHLD:
            if not shared:
                os.kill(child, number)
            continue
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            mebibytes = usage.ru_maxrss >> (20 if sys.platform == "darwin" else 10)
            return _Ending(os.waitstatus_to_exitcode(status), mebibytes)


def _waited_for() -> set[signal.Signals]:
    return {signal.SIGCHLD, *(signal.Signals[name] for name in _PASSED_ON)}


def _next_signal() -> tuple[int, bool]:
    """Which, and whether the child got it too, as it does from the keyboard: Ctrl-C twice would mean more than once.

    A terminal that hangs up tells the first process of its session alone.
    """
    of_the_keyboard = (signal.SIGINT, signal.SIGQUIT)
    if sys.platform.startswith("linux"):
        si_kernel = 0x80
        info = signal.sigwaitinfo(_waited_for())
        return info.si_signo, info.si_code == si_kernel and info.si_signo in of_the_keyboard
    number = signal.sigwait(_waited_for())
    return number, number in of_the_keyboard and _in_the_foreground()


def _in_the_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _judge(command: str, ending: _Ending, notes: Notes) -> int:
    """The command's own exit code; where it could not give one, after one line that says why."""
    for path in notes.left:
        remove(path)
    crashed = signal_name(ending.code) in _NOT_ASKED_FOR
    if ending.code < 0 and not crashed:
        return _end_likewise(-ending.code)
    if notes.ended is not None:
        if crashed:
            _say(f"warning: {command} was done when what it called {how_it_ended(ending.code)}; its result stands")
        return notes.ended if crashed else ending.code
    trace = notes.trace if os.environ.get(TRACEBACK) else ""
    _say(f"error: {_line(command, ending, notes)}", trace)
    return NotAvailableError.exit_code


def _say(text: str, before: str = "") -> None:
    try:
        if sys.stderr.isatty():  # a progress bar hides the cursor and has not ended its line
            sys.stderr.write("\x1b[?25h\n")
        sys.stderr.write(f"{before}mmd-export: {text}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # it is closed or full; the exit code still tells
        sys.stderr = StringIO()  # what is left in its buffer would fail again at the end, and make the code 120


def _line(command: str, ending: _Ending, notes: Notes) -> str:
    name = signal_name(ending.code)
    if name == "SIGKILL":
        next_move = f"free memory{_LESS.get(command, '')} and run again"
    else:
        next_move = f"try another release of what it called{_OTHER.get(command, '')}; {TRACEBACK}=1 shows the trace"
    left = " and ".join(str(path) for path in notes.left if os.path.lexists(path))
    parts = (
        f"{command} {how_it_ended(ending.code)}",
        f", called from {notes.culprit}" if notes.culprit else "",
        f", with {ending.mebibytes:,} MiB taken" if name in ("SIGKILL", "SIGABRT") else "",
        f"; the last it said: {' '.join(notes.said.split())[:200]}" if notes.said else "",
        f"; {left} could not be removed; {next_move}" if left else f"; nothing half-made was left; {next_move}",
    )
    return "".join(parts)


def _end_likewise(number: int) -> int:
    """End by the signal that ended the child, as whoever sent it expects."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number  # the first process of a container is not ended by its own signal
