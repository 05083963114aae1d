"""How a process ended, in words."""

from __future__ import annotations

import signal

_WHY = {"SIGSEGV": "crashed", "SIGABRT": "gave up", "SIGKILL": "was killed, often for want of memory"}


def how_it_ended(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal_name(code)
    return f"{_WHY.get(name, 'was ended')} ({name})"


def signal_name(code: int) -> str:
    """``SIGSEGV`` for -11."""
    return {-number.value: number.name for number in signal.Signals}.get(code, f"signal {-code}")
