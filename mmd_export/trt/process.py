"""Running the builder's process: its progress, its log, and one clear line for every way in which it may end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import mmd_export
from mmd_export.errors import NotAvailableError
from mmd_export.exit_codes import how_it_ended
from mmd_export.folders import scratch_folder
from mmd_export.trt.job import REFUSED, Job

SECONDS_BETWEEN_STEPS = 10.0
SECONDS_BETWEEN_LOOKS = 0.02
_WORKER = [sys.executable, "-m", "mmd_export.trt.worker"]

Notify = Callable[[str], None]


def run_job(
    job: Job, title: str, failure_log: Path | None, notify: Notify, build_log: Path | None = None
) -> dict[str, Any]:
    """Build; returns what the library said of the engine, and keeps its log at ``build_log``.

    Raises NotAvailableError with the builder's own reason, or how it ended and the last useful line of its log, which
    is then kept at ``failure_log``.
    """
    if job.memory_limit is not None and not sys.platform.startswith("linux"):
        raise NotAvailableError(f"{title}: --memory-limit needs Linux; leave it out")
    with scratch_folder() as folder:
        log = folder / "log"
        with log.open("wb") as file:
            code, last = _run(job, file, _Progress(title, notify).hear)
        if code == 0 and "done" in last:
            if build_log is not None:
                with suppress(OSError):  # a full or read-only cache costs no finished engine
                    shutil.copyfile(log, build_log)
            done: dict[str, Any] = last["done"]
            return done
        text = log.read_text(encoding="utf-8", errors="replace")
        refused = code == REFUSED and "refused" in last
        worth, kept = not refused or last["log"], ""
        if worth and failure_log is not None and text.strip():
            shutil.copyfile(log, failure_log)
            kept = f"; all of it is in {failure_log}"
    if refused:
        reason = last["refused"]
    elif last.get("over_limit"):
        taken = last["over_limit"]
        reason = f"its builder took {taken} MiB of memory, --memory-limit is {job.memory_limit} MiB; try more"
    else:
        reason = f"its builder {how_it_ended(code)}; the last it said: {last_useful(text)}"
        killed = "; free memory, or build again with a smaller --workspace"
        reason += killed if code == -signal.SIGKILL else "; use --target onnx, or another release of the library"
    raise NotAvailableError(f"{title}: {reason}{kept}")


def last_useful(log: str) -> str:
    """The last error of the log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("[E]", "[I] [E]")) or "bad_alloc" in line or "Error" in line]
    return (errors or lines or ["nothing"])[-1][:300]


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
            with _limited(process, job.memory_limit) as over:
                for event in _events(process.stdout):
                    last = event
                    hear(event)
                code = process.wait()
            return code, {"over_limit": over[0]} if over else last
        finally:
            process.kill()


@contextmanager
def _limited(process: subprocess.Popen[bytes], limit: int | None) -> Iterator[list[int]]:
    """Kill the process when its own memory passes ``limit`` MiB; what it had then, if it did.

    Not by setrlimit: a library that is refused memory may wait for ever (TensorRT-RTX 1.7.1 did), and CUDA reserves
    more address space than there is memory.
    """
    over: list[int] = []
    if limit is None:
        yield over
        return
    ended = threading.Event()

    def watch() -> None:
        while not over and not ended.wait(SECONDS_BETWEEN_LOOKS):
            if (taken := _mebibytes(process.pid)) > limit:
                over.append(taken)
                process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield over
    finally:
        ended.set()
        watcher.join()


def _mebibytes(pid: int) -> int:
    """Anonymous memory of a process on Linux; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) >> 10 if found else 0


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
        if event.get("support"):
            self.notify(f"{self.title} takes every node")
        elif event.get("top"):
            self.told = now
            self.notify(f"{self.title}: {event['phase']}")
        elif "step" in event and now - self.told > SECONDS_BETWEEN_STEPS:
            self.told = now
            self.notify(f"{self.title}: {event['phase']}, {event['step'] + 1} of {event['of']}")
