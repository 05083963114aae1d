"""A gate on the ratio of two times, both measured now, in blocks.

A block opens every session anew where that is cheap, and then runs its candidates interleaved. Rounds of one block
share what the machine and the layout of memory happen to be; blocks do not. So the unit of the statistics is the block:
one median of paired log ratios each, and Student's interval of their mean (Kalibera and Jones 2013).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmd_export.environment import describe_environment, load
from mmd_export.errors import UsageError
from mmd_export.intervals import CONFIDENCE, mean_interval
from mmd_export.latency import Clock, LatencyReport, Warmup, timed, warmed_up

LEAST_BLOCKS = 6
LOOKS = 10  # before the end, at most so many, each at 99.5 %: by Bonferroni together under 5 %
EARLY = 0.995
LONGEST_SECONDS = 60.0
_BLOCKS = 50  # at most
_REOPEN_SHARE = 0.25  # of the time, at most, goes into opening sessions

Call = Callable[[], object]
Opener = Callable[[], Call]


@dataclass(frozen=True)
class BlockRatio:
    """exp of the mean over blocks of the block's median of ``log(seconds(candidate) / seconds(against))``.

    ``low``, ``high``: its interval; None with fewer than 6 blocks.
    """

    median: float
    low: float | None
    high: float | None
    blocks: int = 0
    rounds: int = 0


EXACTLY_ONE = BlockRatio(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Blocks:
    """Seconds of every candidate, block by block; ``reopened``: each block opened its sessions anew."""

    seconds: tuple[Mapping[str, tuple[float, ...]], ...]
    reopened: bool
    warmup: Mapping[str, Warmup]
    environment: Mapping[str, Any]

    def ratio(self, candidate: str, against: str, confidence: float = CONFIDENCE) -> BlockRatio:
        """Of two candidates, with its interval over the blocks."""
        return block_ratio(self.seconds, candidate, against, confidence)

    def latency(self) -> LatencyReport:
        """All rounds as one report."""
        names = list(self.seconds[0])
        joined = {name: tuple(value for block in self.seconds for value in block[name]) for name in names}
        return LatencyReport(joined, self.warmup, self.environment)


def block_ratio(
    blocks: Sequence[Mapping[str, Sequence[float]]], candidate: str, against: str, confidence: float = CONFIDENCE
) -> BlockRatio:
    """The ratio of two candidates over blocks of rounds."""
    medians = np.array([float(np.median(np.log(block[candidate]) - np.log(block[against]))) for block in blocks])
    rounds = sum(len(block[candidate]) for block in blocks)
    if len(medians) < LEAST_BLOCKS:
        return BlockRatio(math.exp(medians.mean()), None, None, len(medians), rounds)
    low, high = mean_interval(medians, confidence)
    return BlockRatio(math.exp(medians.mean()), math.exp(low), math.exp(high), len(medians), rounds)


@dataclass(frozen=True)
class Limit:
    """``candidate`` may take at most ``most`` times what the ratio to ``against`` was in ``base``."""

    candidate: str
    against: str
    most: float
    base: BlockRatio = EXACTLY_ONE


@dataclass(frozen=True)
class GateVerdict:
    """What the interval of the change says: ``now / limit.base``, above 1 where the candidate became slower.

    "fail": the whole interval lies above the limit; "pass": it lies at or below; "undecided": the limit lies within,
    or there were too few blocks for an interval.
    """

    verdict: Literal["pass", "fail", "undecided"]
    limit: Limit
    now: BlockRatio
    change: BlockRatio

    @property
    def failed(self) -> bool:
        """Whether a regression is proven."""
        return self.verdict == "fail"

    @property
    def rounds_needed(self) -> int | None:
        """How many rounds would narrow the interval to where the limit lies outside, if the ratio stays as it is."""
        change, far = self.change, abs(math.log(self.change.median / self.limit.most))
        if change.low is None or change.high is None or far == 0.0:
            return None
        half = math.log(change.high / change.low) / 2
        return math.ceil(self.now.rounds * max(1.0, half / far) ** 2)

    @property
    def message(self) -> str:
        """The verdict with its numbers and the next move, in one line."""
        limit, now = self.limit, self.now
        numbers = f"{limit.candidate} takes {now.median:.3f} times {limit.against}"
        if limit.base is not EXACTLY_ONE:
            numbers += f", {self.change.median:.3f} times the baseline's {limit.base.median:.3f}"
        size = f"{now.rounds} rounds in {now.blocks} blocks"
        interval = (
            "no interval"
            if self.change.low is None
            else f"95 % interval {self.change.low:.3f} to {self.change.high:.3f}"
        )
        needed = f"about {self.rounds_needed} rounds" if self.rounds_needed else "more rounds"
        moves = {
            "pass": "",
            "fail": "; make it faster or raise the limit",
            "undecided": f"; {needed} would do, or a quieter machine",
        }
        return f"{self.verdict}: {numbers} ({interval}, {size}), the limit is {limit.most:.3f}{moves[self.verdict]}"

    def to_dict(self) -> dict[str, Any]:
        facts = {"candidate": self.limit.candidate, "against": self.limit.against, "limit": self.limit.most}
        ratios = {"now": vars(self.now), "baseline": vars(self.limit.base), "change": vars(self.change)}
        return {"verdict": self.verdict, **facts, **ratios, "message": self.message}


def judge(limit: Limit, blocks: Blocks, confidence: float = CONFIDENCE) -> GateVerdict:
    """The verdict on what was measured, by the interval at that confidence; the report's is always at 95 %."""
    now = blocks.ratio(limit.candidate, limit.against)
    change = changed(now, limit.base)
    deciding = change
    if confidence != CONFIDENCE:
        deciding = changed(blocks.ratio(limit.candidate, limit.against, confidence), limit.base)
    if deciding.low is None or deciding.high is None:
        return GateVerdict("undecided", limit, now, change)
    if deciding.low > limit.most:
        return GateVerdict("fail", limit, now, change)
    return GateVerdict("pass" if deciding.high <= limit.most else "undecided", limit, now, change)


def changed(now: BlockRatio, base: BlockRatio) -> BlockRatio:
    """``now / base`` with the interval of both: MOVER on the logarithms, Zou and Donner 2008.

    L = d - sqrt((r - r_low)^2 + (b_high - b)^2), and U likewise, of d = r - b.
    """
    centre = math.log(now.median) - math.log(base.median)
    if now.low is None or now.high is None or base.low is None or base.high is None:
        return BlockRatio(math.exp(centre), None, None, now.blocks, now.rounds)
    down = math.hypot(math.log(now.median / now.low), math.log(base.high / base.median))
    up = math.hypot(math.log(now.high / now.median), math.log(base.median / base.low))
    return BlockRatio(math.exp(centre), math.exp(centre - down), math.exp(centre + up), now.blocks, now.rounds)


@dataclass(frozen=True)
class BlockPlan:
    """How long to measure: ``seconds``, or exactly ``rounds`` of each candidate if given."""

    seconds: float = 45.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < LEAST_BLOCKS:
            raise UsageError(f"a gate takes at least {LEAST_BLOCKS} rounds, this run has {self.rounds}; raise --rounds")
        if not 0 < self.seconds <= LONGEST_SECONDS:
            raise UsageError(f"a gate takes at most {LONGEST_SECONDS:g} s, --seconds is {self.seconds:g}; lower it")

    def layout(self, left: float, opening: float) -> Layout:
        """The blocks for ``left`` seconds where opening all sessions takes ``opening``."""
        affordable = int(_REOPEN_SHARE * left / opening) if opening > 0 else _BLOCKS
        reopen = affordable >= LEAST_BLOCKS
        blocks = min(_BLOCKS, affordable) if reopen else _BLOCKS
        if self.rounds is not None:
            return Layout(math.inf, max(1, self.rounds // blocks), reopen)
        return Layout((left - (blocks * opening if reopen else 0.0)) / blocks, None, reopen)


@dataclass(frozen=True)
class Layout:
    """A block ends after ``seconds``, or after so many ``rounds``; ``reopen``: each opens its sessions anew."""

    seconds: float
    rounds: int | None
    reopen: bool


def measure_blocks(
    openers: Mapping[str, Opener],
    plan: BlockPlan,
    limits: Sequence[Limit] = (),
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Blocks:
    """Blocks of interleaved rounds until ``plan`` is spent, or every limit is decided at 99.5 % before.

    Args:
        openers: by name, what opens a session and returns one inference as a call.
        plan: how long.
        limits: what is to be decided; none: the whole plan is measured.
        seed: of the order.
        clock: seconds, rising.
    """
    start, environment = clock(), describe_environment()
    calls, opening = _opened(openers, clock)
    warm = warmed_up(calls, 50, clock, plan.seconds)
    order, looks = np.random.default_rng(seed), 0
    layout = plan.layout(plan.seconds - (clock() - start), opening)
    measured: list[Mapping[str, tuple[float, ...]]] = []
    while True:
        measured.append(_one_block(calls, _next(layout, plan, measured), order, clock))
        elapsed, blocks = clock() - start, Blocks(tuple(measured), layout.reopen, warm, environment)
        due = min(LOOKS, int(elapsed * (LOOKS + 1) / plan.seconds))
        decided = due > looks and plan.rounds is None and _decided(limits, blocks)
        looks = due
        if decided or _spent(plan, blocks, elapsed):
            environment["load_after"] = load()
            return blocks
        if layout.reopen:
            calls, _ = _opened(openers, clock)


def _opened(openers: Mapping[str, Opener], clock: Clock) -> tuple[dict[str, Call], float]:
    """New sessions, each run twice because the first run allocates, and the seconds that this took."""
    start = clock()
    calls = {name: opener() for name, opener in openers.items()}
    for call in calls.values():
        call()
        call()
    return calls, clock() - start


def _next(layout: Layout, plan: BlockPlan, measured: Sequence[Mapping[str, tuple[float, ...]]]) -> Layout:
    """The layout of the next block: the last one takes what is left of the plan's rounds."""
    if plan.rounds is None or layout.rounds is None:
        return layout
    left = plan.rounds - _rounds(measured)
    return layout if left >= 2 * layout.rounds else replace(layout, rounds=left)


def _rounds(measured: Sequence[Mapping[str, tuple[float, ...]]]) -> int:
    return sum(len(next(iter(block.values()))) for block in measured)


def _one_block(
    calls: Mapping[str, Call], layout: Layout, order: np.random.Generator, clock: Clock
) -> Mapping[str, tuple[float, ...]]:
    """At least one round."""
    names, end = list(calls), clock() + layout.seconds
    seconds: dict[str, list[float]] = {name: [] for name in names}
    while True:
        for place in order.permutation(len(names)):
            seconds[names[place]].append(timed(names[place], calls[names[place]], clock))
        if clock() >= end or len(seconds[names[0]]) == layout.rounds:
            return {name: tuple(values) for name, values in seconds.items()}


def _decided(limits: Sequence[Limit], blocks: Blocks) -> bool:
    """Whether no limit is open at 99.5 %."""
    return bool(limits) and all(judge(limit, blocks, EARLY).verdict != "undecided" for limit in limits)


def _spent(plan: BlockPlan, blocks: Blocks, elapsed: float) -> bool:
    """Whether another block would be too much; fewer than 6 blocks are made only if 60 s do not hold them."""
    done = len(blocks.seconds)
    if plan.rounds is not None:
        return _rounds(blocks.seconds) == plan.rounds
    after = elapsed * (done + 1) / done
    return after > (plan.seconds if done >= LEAST_BLOCKS else LONGEST_SECONDS)
