"""Latency of several candidates in one interleaved run, and a gate on the ratio measured there.

In every round each candidate runs once, in an order drawn anew, so what the machine does meanwhile meets all alike and
the ratio of two times of one round is free of it. The order, and the bootstrap, come from seeded generators.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmd_export.environment import describe_environment, load
from mmd_export.errors import MmdExportError, UsageError
from mmd_export.intervals import LEAST_ROUNDS, RESAMPLES, percentile_interval, rounds_for

Clock = Callable[[], float]
PERCENTILES = (50.0, 90.0, 99.0)
REST = 0.1  # seconds; threads of the run before that wait for more work at full speed have given up by then
RESOLUTION = 0.05  # a difference that a run is expected to tell from none
_WINDOW = 5
_STABLE = 0.10


@dataclass(frozen=True)
class Warmup:
    """Runs made before measuring, and whether the last medians of 5 agreed within 10 %."""

    runs: int
    stable: bool


@dataclass(frozen=True)
class Percentile:
    """Seconds of one percentile with its bootstrap 95 % interval; the interval is None with fewer than 6 rounds."""

    percent: float
    seconds: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """Seconds a run. A percentile that so many rounds cannot support is left out."""

    rounds: int
    median: float
    mean: float
    percentiles: tuple[Percentile, ...]

    def percentile(self, percent: float) -> Percentile | None:
        """That percentile, if the rounds support it."""
        return next((found for found in self.percentiles if found.percent == percent), None)

    def to_dict(self) -> dict[str, Any]:
        found = {f"p{found.percent:g}": found for found in self.percentiles}
        known = {
            name: None if name not in found else {key: getattr(found[name], key) for key in ("seconds", "low", "high")}
            for name in (f"p{percent:g}" for percent in PERCENTILES)
        }
        return {"rounds": self.rounds, "median": self.median, "mean": self.mean, **known}


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
        """Median, mean, and those of p50, p90 and p99 that the rounds support."""
        values = np.array(self._seconds(name))
        found = []
        for percent in PERCENTILES:
            if len(values) >= rounds_for(percent):
                enough = len(values) >= LEAST_ROUNDS
                low, high = percentile_interval(values, percent) if enough else (None, None)
                found.append(Percentile(percent, float(np.percentile(values, percent)), low, high))
        return Summary(len(values), float(np.median(values)), float(values.mean()), tuple(found))

    def ratio(self, candidate: str, against: str, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
        """Paired time ratio of two candidates with its bootstrap interval."""
        ratios = np.array(self._seconds(candidate)) / np.array(self._seconds(against))
        enough = len(ratios) >= LEAST_ROUNDS
        low, high = percentile_interval(ratios, 50, resamples, seed) if enough else (None, None)
        return Ratio(candidate, against, float(np.median(ratios)), low, high, len(ratios))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers cannot say, and how many rounds would do."""
        needed = [(LEAST_ROUNDS, "no interval"), (rounds_for(90), "no p90"), (rounds_for(99), "no p99")]
        few = [
            f"{what}: it takes {least} rounds, this run has {self.rounds}"
            for least, what in needed
            if self.rounds < least
        ]
        shaky = [
            f"{name}: not yet stable within 10 % after {warmup.runs} warm-up runs"
            for name, warmup in self.warmup.items()
            if not warmup.stable
        ]
        first, *others = self.seconds
        return (*few, *shaky, *(note for name in others if (note := noise_note(self.ratio(name, first)))))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: summaries, all pairs' ratios, raw seconds, environment, notes."""
        names = list(self.seconds)
        pairs = [(a, b) for place, a in enumerate(names) for b in names[:place]]
        return {
            "rounds": self.rounds,
            "summary": {name: self.summary(name).to_dict() for name in names},
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


def noise_note(ratio: Ratio, resolution: float = RESOLUTION) -> str:
    """A warning if the interval is too wide to tell ``resolution`` from no difference, with the rounds that would do.

    The half width shrinks as 1 / sqrt(rounds).
    """
    if ratio.low is None or ratio.high is None:
        return ""
    half = (ratio.high - ratio.low) / 2 / ratio.median
    if half <= resolution:
        return ""
    rounds = math.ceil(ratio.rounds * (half / resolution) ** 2)
    return (
        f"too noisy to conclude: {ratio.candidate} / {ratio.against} is known to +-{100 * half:.0f} % after "
        f"{ratio.rounds} rounds; about {rounds} rounds would tell {100 * resolution:.0f} % apart"
    )


def require_reported(percentiles: Sequence[float]) -> None:
    """Raise UsageError for a percentile that no summary has."""
    for percent in percentiles:
        if percent not in PERCENTILES:
            raise UsageError(f"percentile {percent:g} is not reported; p50, p90 and p99 are")


def require_rounds(rounds: int, percentiles: Sequence[float]) -> None:
    """Raise UsageError if a percentile is not reported or needs more rounds."""
    require_reported(percentiles)
    for percent in percentiles:
        if rounds < (least := rounds_for(percent)):
            raise UsageError(f"p{percent:g} takes at least {least} rounds, this run has {rounds}; raise --rounds")


def measure(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 50,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    rest: float = 0.0,
    seconds: float = math.inf,
) -> LatencyReport:
    """Run every candidate once a round, in an order drawn anew each round.

    Args:
        candidates: what to run, by name; each call is one inference.
        rounds: how many seconds to keep of each.
        warmup: at most so many runs of each before, fewer once the median of 5 agrees with the 5 before within 10 %.
        seed: of the order.
        clock: seconds, rising.
        rest: seconds asleep before each run. Without it the idle threads of torch and of each session, which spin for
            a while, take the processor from the run that follows.
        seconds: the time there is, of which ``warmed_up`` takes its share.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise UsageError(f"{len(candidates)} candidates, {rounds} rounds, {warmup} warm-up runs; give at least 1, 1, 0")
    environment = describe_environment()
    warm = warmed_up(candidates, warmup, clock, seconds)
    names, order = list(candidates), np.random.default_rng(seed)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for place in order.permutation(len(names)):
            time.sleep(rest)
            taken[names[place]].append(timed(names[place], candidates[names[place]], clock))
    environment["load_after"] = load()
    return LatencyReport({name: tuple(values) for name, values in taken.items()}, warm, environment)


def warmed_up(
    candidates: Mapping[str, Callable[[], object]], most: int, clock: Clock, seconds: float
) -> dict[str, Warmup]:
    """Every candidate after ``warm_up``, all of them together for a tenth of ``seconds`` and the last run of each."""
    share = seconds / 10 / len(candidates)
    return {name: warm_up(run, most, clock, share) for name, run in candidates.items()}


def warm_up(
    run: Callable[[], object], most: int, clock: Clock = time.perf_counter, seconds: float = math.inf
) -> Warmup:
    """Run until the median of 5 agrees with that of the 5 before within 10 %, ``most`` times or ``seconds`` long."""
    taken: list[float] = []
    while len(taken) < most and sum(taken) < seconds:
        start = clock()
        run()
        taken.append(clock() - start)
        if len(taken) >= 2 * _WINDOW:
            last = statistics.median(taken[-_WINDOW:])
            before = statistics.median(taken[-2 * _WINDOW : -_WINDOW])
            if abs(last - before) <= _STABLE * before:
                return Warmup(len(taken), True)
    return Warmup(len(taken), False)


def timed(name: str, run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one run."""
    start = clock()
    run()
    seconds = clock() - start
    if not seconds > 0:
        raise MmdExportError(f"{name} took {seconds} s by this clock, which cannot be compared; run it longer")
    return seconds
