"""Cold load and first image: a bundle opened and run once in a fresh process, which measures itself."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmd_export.commands.candidates import Candidate
from mmd_export.errors import MmdExportError, NotAvailableError
from mmd_export.exit_codes import how_it_ended

RUNS = 3  # of one process after its first image; memory is the peak over all of them


@dataclass(frozen=True)
class ColdStart:
    """Medians over fresh processes; seconds and MiB.

    ``process``: from the start of the interpreter to the first image. ``load``: opening the checked bundle in its
    runtime, its library imported on the way. ``first``: the first run. ``host_mib``: peak of the process' memory.
    ``device_mib``: what the GPU had less afterwards, None without one.
    """

    processes: int
    process: float
    load: float
    first: float
    host_mib: float | None
    device_mib: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cold_start(candidate: Candidate, batch: int, processes: int, threads: int) -> ColdStart:
    """Start ``processes`` fresh ones, one after the other."""
    assert candidate.bundle is not None
    arguments = [str(candidate.bundle.folder.resolve()), candidate.runtime, str(batch), str(threads)]
    found = [_one(candidate.name, arguments) for _ in range(processes)]

    def median(name: str) -> float | None:
        values = [each[name] for each in found if each[name] is not None]
        return statistics.median(values) if values else None

    seconds = {name: median(name) or 0.0 for name in ("process", "load", "first")}
    return ColdStart(processes, **seconds, host_mib=median("host_mib"), device_mib=median("device_mib"))


def _one(name: str, arguments: list[str]) -> Mapping[str, Any]:
    """What one process said, its start on the clock of this one."""
    command, start = [sys.executable, "-m", "mmd_export.commands.cold", *arguments], time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise NotAvailableError(f"{name}: a fresh process that ran it {how_it_ended(done.returncode)}; try --cold 0")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise MmdExportError(f"{name}: a fresh process could not run it: {last[:300]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process": found["first_image_at"] - start}


def main(folder: str, runtime_name: str, batch: str, threads: str) -> None:
    """In the fresh process: open, run, say."""
    from mmd_export.bundle import Bundle
    from mmd_export.commands.candidates import inputs_of
    from mmd_export.runtime import RunOptions
    from mmd_runtime.registry import get_runtime

    bundle, runtime = Bundle.open(Path(folder)), get_runtime(runtime_name)
    inputs, free_before = inputs_of(bundle, int(batch)), free_device_bytes()
    start = time.perf_counter()
    session = runtime.open(bundle, RunOptions(int(threads)))
    opened = time.perf_counter()
    session.run(inputs)
    first, at = time.perf_counter(), time.time()
    for _ in range(RUNS):
        session.run(inputs)
    free_after = free_device_bytes()
    device = None if free_before is None or free_after is None else (free_before - free_after) / 2**20
    facts = {"load": opened - start, "first": first - opened, "first_image_at": at}
    sys.stdout.write(json.dumps({**facts, "host_mib": peak_host_mib(), "device_mib": device}) + "\n")


def peak_host_mib() -> float | None:
    """Largest resident memory of this process so far, where the system counts it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def free_device_bytes() -> int | None:
    """Free memory of the first GPU; None without one, or without cuda-python."""
    from mmd_export.trt.device import find_device
    from mmd_runtime.cuda import Cuda, installed

    if not installed() or find_device() is None:
        return None
    free, _ = Cuda().values("cudaMemGetInfo")
    return int(free)


if __name__ == "__main__":
    main(*sys.argv[1:])
