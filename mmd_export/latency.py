"""Latency of several candidates in one interleaved run, and a gate on the ratio measured there.

In every round each candidate runs once, in an order drawn anew, so what the machine does meanwhile meets all alike and
the ratio of two times of one round is free of it. The order, and the bootstrap, come from seeded generators.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import MmdExportError, UsageError

CONFIDENCE = 0.95
LEAST_ROUNDS = 6  # the range of 6 draws covers the median with 1 - 2 / 2**6 = 97 %, that of 5 with 94 %
_WINDOW = 5
_STABLE = 0.10
_RESAMPLES = 2000
_PACKAGES = ("mmd-export", "numpy", "onnx", "onnxruntime", "openvino", "torch", "diffusers")


@dataclass(frozen=True)
class Warmup:
    """Runs made before measuring, and whether the last medians of 5 agreed within 10 %."""

    runs: int
    stable: bool


@dataclass(frozen=True)
class Summary:
    """Seconds a run. A percentile that so many rounds cannot support is None."""

    rounds: int
    median: float
    mean: float
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of ``seconds(candidate) / seconds(against)``, above 1 where the candidate is slower.

    ``low``, ``high``: bootstrap 95 % interval of that median; None with fewer than 6 rounds.
    """

    candidate: str
    against: str
    median: float
    low: float | None
    high: float | None
    rounds: int


@dataclass(frozen=True)
class LatencyReport:
    """Raw seconds of every candidate; the i-th of each belong to the same round."""

    seconds: Mapping[str, tuple[float, ...]]
    warmup: Mapping[str, Warmup]
    environment: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """How often each candidate was measured."""
        return len(next(iter(self.seconds.values())))

    def summary(self, name: str) -> Summary:
        """Median, mean, 90th and 99th percentile of one candidate."""
        values = np.array(self._seconds(name))
        p90 = float(np.percentile(values, 90)) if len(values) >= 10 else None
        p99 = float(np.percentile(values, 99)) if len(values) >= 100 else None
        return Summary(len(values), float(np.median(values)), float(values.mean()), p90, p99)

    def ratio(self, candidate: str, against: str, resamples: int = _RESAMPLES, seed: int = 0) -> Ratio:
        """Paired time ratio of two candidates with its bootstrap interval."""
        ratios = np.array(self._seconds(candidate)) / np.array(self._seconds(against))
        low, high = _median_interval(ratios, resamples, seed) if len(ratios) >= LEAST_ROUNDS else (None, None)
        return Ratio(candidate, against, float(np.median(ratios)), low, high, len(ratios))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers cannot say."""
        lines = []
        for least, what in ((LEAST_ROUNDS, "no interval of a ratio"), (10, "no p90"), (100, "no p99")):
            if self.rounds < least:
                lines.append(f"{what}: it takes {least} rounds, this run has {self.rounds}")
        for name, warmup in self.warmup.items():
            if not warmup.stable:
                lines.append(f"{name}: not yet stable within 10 % after {warmup.runs} warm-up runs")
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: summaries, all pairs' ratios, raw seconds, environment, notes."""
        names = list(self.seconds)
        pairs = [(a, b) for place, a in enumerate(names) for b in names[:place]]
        return {
            "rounds": self.rounds,
            "summary": {name: vars(self.summary(name)) for name in names},
            "ratios": [vars(self.ratio(a, b)) for a, b in pairs],
            "seconds": {name: list(values) for name, values in self.seconds.items()},
            "warmup": {name: vars(warmup) for name, warmup in self.warmup.items()},
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }

    def _seconds(self, name: str) -> tuple[float, ...]:
        if name not in self.seconds:
            raise UsageError(f"candidate {name!r} was not measured; measured: {', '.join(self.seconds)}")
        return self.seconds[name]


@dataclass(frozen=True)
class GateVerdict:
    """Whether a candidate is slower than ``limit`` times another, judged by the interval of the ratio.

    "fail": the whole interval lies above the limit; "pass": it lies at or below; "undecided": the limit lies within,
    or there were too few rounds for an interval.
    """

    verdict: Literal["pass", "fail", "undecided"]
    ratio: Ratio
    limit: float

    @property
    def failed(self) -> bool:
        """Whether a regression is proven."""
        return self.verdict == "fail"

    @property
    def message(self) -> str:
        """The verdict with its numbers and the next move, in one line."""
        ratio = self.ratio
        interval = "no interval" if ratio.low is None else f"95 % interval {ratio.low:.3f} to {ratio.high:.3f}"
        numbers = (
            f"{ratio.candidate} takes {ratio.median:.3f} times {ratio.against} ({interval}, {ratio.rounds} rounds)"
        )
        moves = {
            "pass": "",
            "fail": "; make it faster or raise the limit",
            "undecided": "; measure more rounds on a quieter machine",
        }
        return f"{self.verdict}: {numbers}, the limit is {self.limit:.3f}{moves[self.verdict]}"


def measure(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 50,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyReport:
    """Run every candidate once a round, in an order drawn anew each round.

    Args:
        candidates: what to run, by name; each call is one inference.
        rounds: how many seconds to keep of each.
        warmup: at most so many runs of each before, fewer once the median of 5 agrees with the 5 before within 10 %.
        seed: of the order.
        clock: seconds, rising.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise UsageError(f"{len(candidates)} candidates, {rounds} rounds, {warmup} warm-up runs; give at least 1, 1, 0")
    environment = describe_environment()
    warm = {name: _warm_up(run, warmup, clock) for name, run in candidates.items()}
    names, order = list(candidates), np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for place in order.permutation(len(names)):
            seconds[names[place]].append(_timed(names[place], candidates[names[place]], clock))
    environment["load_after"] = _load()
    return LatencyReport({name: tuple(values) for name, values in seconds.items()}, warm, environment)


def gate(report: LatencyReport, candidate: str, against: str, max_regression: float) -> GateVerdict:
    """Whether ``candidate`` takes at most ``1 + max_regression`` times ``against``, both measured in this report."""
    ratio, limit = report.ratio(candidate, against), 1.0 + max_regression
    if ratio.low is None or ratio.high is None:
        return GateVerdict("undecided", ratio, limit)
    if ratio.low > limit:
        return GateVerdict("fail", ratio, limit)
    return GateVerdict("pass" if ratio.high <= limit else "undecided", ratio, limit)


def describe_environment() -> dict[str, Any]:
    """What the numbers depend on; no host name, no user, no path."""
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "load_before": _load(),
    }


def _warm_up(run: Callable[[], object], most: int, clock: Callable[[], float]) -> Warmup:
    seconds: list[float] = []
    while len(seconds) < most:
        start = clock()
        run()
        seconds.append(clock() - start)
        if len(seconds) >= 2 * _WINDOW:
            last = statistics.median(seconds[-_WINDOW:])
            before = statistics.median(seconds[-2 * _WINDOW : -_WINDOW])
            if abs(last - before) <= _STABLE * before:
                return Warmup(len(seconds), True)
    return Warmup(len(seconds), False)


def _timed(name: str, run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    seconds = clock() - start
    if not seconds > 0:
        raise MmdExportError(f"{name} took {seconds} s by this clock, which cannot be compared; run it longer")
    return seconds


def _median_interval(values: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the median; Efron 1979."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def _load() -> list[float] | None:
    """Load average over 1, 5 and 15 minutes, where the system keeps one."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's name from the operating system, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
