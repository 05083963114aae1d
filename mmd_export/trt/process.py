"""Running the builder's process: its progress, its log, and one clear line for every way in which it may end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import mmd_export
from mmd_export.errors import NotAvailableError
from mmd_export.trt.job import REFUSED, Job

SECONDS_BETWEEN_STEPS = 10.0
_WORKER = [sys.executable, "-m", "mmd_export.trt.worker"]

Notify = Callable[[str], None]


def run_job(job: Job, title: str, keep_log: Path | None, notify: Notify) -> dict[str, Any]:
    """Build; returns what the library said of the engine.

    Raises NotAvailableError with the builder's own reason, or how it ended and the last useful line of its log, which
    is then kept at ``keep_log``.
    """
    if job.memory_limit is not None and os.name == "nt":
        raise NotAvailableError(f"{title}: --memory-limit needs a POSIX system; leave it out")
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            code, last = _run(job, file, _Progress(title, notify).hear)
        if code == 0 and "done" in last:
            done: dict[str, Any] = last["done"]
            return done
        text = log.read_text(encoding="utf-8", errors="replace")
        refused = code == REFUSED and "refused" in last
        tried, kept = not refused or last["failed"], ""
        if tried and keep_log is not None and text.strip():
            shutil.copyfile(log, keep_log)
            kept = f"; all of it is in {keep_log}"
    reason = last["refused"] if refused else f"its builder {how_it_ended(code)}; the last it said: {last_useful(text)}"
    raise NotAvailableError(f"{title}: {reason}{_advice(job, code) if tried else ''}{kept}")


def how_it_ended(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-code, f"signal {-code}")
    why = {
        "SIGSEGV": "crashed",
        "SIGABRT": "gave up",
        "SIGKILL": "was killed, often for want of memory",
    }
    return f"{why.get(name, 'was ended')} ({name})"


def last_useful(log: str) -> str:
    """The last error of the log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("[E]", "[I] [E]")) or "bad_alloc" in line or "Error" in line]
    return (errors or lines or ["nothing"])[-1][:300]


def _advice(job: Job, code: int) -> str:
    """The next move where memory may be what lacked."""
    if job.memory_limit is not None:
        return f"; --memory-limit is {job.memory_limit} MiB, try more"
    return "; try --workspace with fewer MiB" if code == -9 else ""


def _run(job: Job, log: IO[bytes], hear: Callable[[dict[str, Any]], None]) -> tuple[int, dict[str, Any]]:
    """Exit code and last event of the process, which never outlives this call."""
    folder = str(Path(mmd_export.__file__).parents[1])
    path = os.pathsep.join(part for part in (folder, os.environ.get("PYTHONPATH", "")) if part)
    environment, pipe = {**os.environ, "PYTHONPATH": path}, subprocess.PIPE
    last: dict[str, Any] = {}
    with subprocess.Popen(_WORKER, stdin=pipe, stdout=pipe, stderr=log, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it ended before it read; its exit code says how
                process.stdin.write(job.to_json().encode())
                process.stdin.close()
            for event in _events(process.stdout):
                last = event
                hear(event)
            return process.wait(), last
        finally:
            process.kill()


def _events(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was ended while it wrote
        yield event


class _Progress:
    """Tells the outermost phases as they start, and a step of any phase every so often."""

    def __init__(self, title: str, notify: Notify) -> None:
        self.title, self.notify, self.told = title, notify, time.monotonic()

    def hear(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if support := event.get("support"):
            self.notify(f"{self.title} takes {support['taken']:,} of {support['nodes']:,} nodes")
        elif event.get("top"):
            self.told = now
            self.notify(f"{self.title}: {event['phase']}")
        elif "step" in event and now - self.told > SECONDS_BETWEEN_STEPS:
            self.told = now
            self.notify(f"{self.title}: {event['phase']}, {event['step'] + 1} of {event['of']}")
