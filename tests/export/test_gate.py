"""The gate by a fake clock: sessions that differ from opening to opening, noise in waves, real slow-downs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from mmd_export.errors import UsageError
from mmd_export.gate import (
    LONGEST_SECONDS,
    BlockPlan,
    BlockRatio,
    Blocks,
    GateVerdict,
    Limit,
    block_ratio,
    changed,
    judge,
    measure_blocks,
)
from mmd_export.intervals import mean_interval

LIMIT = Limit("new", "old", 1.05)


class Machine:
    """A clock that only runs move: each takes its time, times the luck of its session and of the moment."""

    def __init__(self, seed: int, jitter: float, luck: float, opening: float = 0.2) -> None:
        self.now, self.jitter, self.luck, self.opening = 0.0, jitter, luck, opening
        self.random, self.opened = np.random.default_rng(seed), 0

    def clock(self) -> float:
        return self.now

    def opener(self, seconds: float) -> Callable[[], Callable[[], object]]:
        def opened() -> Callable[[], object]:
            self.now += self.opening
            self.opened += 1
            mine = seconds * math.exp(self.luck * self.random.normal())

            def run() -> None:
                wave = 1.0 + 0.3 * math.sin(self.now / 3)
                self.now += mine * wave * math.exp(self.jitter * min(10.0, abs(self.random.standard_t(3))))

            return run

        return opened


def gated(slower: float, seed: int, *, jitter: float = 0.15, luck: float = 0.01, seconds: float = 30.0) -> GateVerdict:
    machine = Machine(seed, jitter, luck)
    openers = {"new": machine.opener(0.01 * slower), "old": machine.opener(0.01)}
    blocks = measure_blocks(openers, BlockPlan(seconds), (LIMIT,), seed=seed, clock=machine.clock)
    assert machine.now <= LONGEST_SECONDS
    return judge(LIMIT, blocks)


def test_equal_sessions_pass_and_ten_percent_is_found() -> None:
    equal = [gated(1.0, seed).verdict for seed in range(30)]
    slow = [gated(1.1, seed).verdict for seed in range(30)]
    assert equal.count("fail") == 0
    assert equal.count("pass") >= 28
    assert slow.count("fail") >= 28


def test_rounds_of_one_session_are_not_taken_for_independent() -> None:
    """With 10 % of luck a session, rounds by the thousand in one pair of sessions would be sure of the wrong thing."""
    verdicts = [gated(1.0, seed, luck=0.1) for seed in range(30)]
    assert sum(verdict.failed for verdict in verdicts) == 0


def test_sessions_are_opened_anew_where_that_is_cheap_only() -> None:
    for opening, reopened in ((0.1, True), (30.0, False)):
        machine = Machine(0, 0.1, 0.0, opening)
        openers = {"new": machine.opener(0.01), "old": machine.opener(0.01)}
        blocks = measure_blocks(openers, BlockPlan(40.0), clock=machine.clock)
        assert blocks.reopened is reopened
        assert machine.opened == (2 * len(blocks.seconds) if reopened else 2)


def test_a_clear_case_ends_early_and_an_open_one_takes_its_time() -> None:
    def rounds(slower: float) -> int:
        return gated(slower, 1, jitter=0.05).now.rounds

    assert rounds(1.5) < rounds(1.05) / 2


def test_given_rounds_are_kept_and_too_few_are_refused() -> None:
    machine = Machine(0, 0.1, 0.0)
    openers = {"new": machine.opener(0.01), "old": machine.opener(0.01)}
    blocks = measure_blocks(openers, BlockPlan(rounds=8), (LIMIT,), clock=machine.clock)
    assert blocks.latency().rounds == 8
    for opening in (0.1, 0.15, 0.2, 30.0):  # which makes more or fewer blocks of it
        machine = Machine(0, 0.1, 0.0, opening)
        openers = {"new": machine.opener(0.01), "old": machine.opener(0.01)}
        plan = BlockPlan(rounds=100)
        assert measure_blocks(openers, plan, (LIMIT,), clock=machine.clock).latency().rounds == 100
    with pytest.raises(UsageError, match="a gate takes at least 6 rounds, this run has 5"):
        BlockPlan(rounds=5)
    with pytest.raises(UsageError, match="a gate takes at most 60 s, --seconds is 61"):
        BlockPlan(61.0)


def test_a_model_that_is_too_slow_stays_undecided_within_a_minute() -> None:
    machine = Machine(0, 0.1, 0.0, opening=1.0)
    openers = {"new": machine.opener(6.0), "old": machine.opener(6.0)}
    blocks = measure_blocks(openers, BlockPlan(30.0), (LIMIT,), clock=machine.clock)
    verdict = judge(LIMIT, blocks)
    assert verdict.verdict == "undecided"
    assert verdict.now.low is None
    assert "no interval" in verdict.message


def blocks_of(ratios: list[float]) -> Blocks:
    seconds = tuple({"new": (ratio,) * 3, "old": (1.0,) * 3} for ratio in ratios)
    return Blocks(seconds, True, {}, {})


def test_the_verdicts_and_what_they_say() -> None:
    cases: Mapping[str, list[float]] = {
        "pass": [1.00, 1.01, 0.99, 1.00, 1.01, 0.99],
        "fail": [1.10, 1.11, 1.09, 1.10, 1.11, 1.09],
        "undecided": [1.00, 1.12, 0.95, 1.10, 1.02, 1.09],
    }
    for expected, ratios in cases.items():
        verdict = judge(LIMIT, blocks_of(ratios))
        assert verdict.verdict == expected
        assert "the limit is 1.050" in verdict.message
        assert f"{verdict.now.median:.3f} times old" in verdict.message
    needed = judge(LIMIT, blocks_of(cases["undecided"]))
    assert needed.rounds_needed is not None
    assert needed.rounds_needed > needed.now.rounds
    assert f"about {needed.rounds_needed} rounds would do" in needed.message


def test_the_change_carries_the_uncertainty_of_the_baseline_too() -> None:
    now = BlockRatio(0.55, 0.54, 0.56, 10, 100)
    sure, unsure = BlockRatio(0.5, 0.4999, 0.5001, 10, 100), BlockRatio(0.5, 0.45, 0.55, 10, 100)
    assert changed(now, sure).median == pytest.approx(1.1)
    low, high = changed(now, unsure).low, changed(now, unsure).high
    assert low is not None
    assert high is not None
    assert low < 1.0 < high
    limit = Limit("new", "old", 1.05, sure)
    assert judge(limit, blocks_of([0.55, 0.551, 0.549] * 3)).verdict == "fail"
    assert judge(Limit("new", "old", 1.05, unsure), blocks_of([0.55, 0.551, 0.549] * 3)).verdict == "undecided"


def test_the_interval_over_blocks_covers_the_truth_where_blocks_differ() -> None:
    random, covered, trials = np.random.default_rng(3), 0, 400
    for _ in range(trials):
        blocks = []
        for _ in range(8):
            shift = 0.05 * random.normal()
            old, new = np.exp(0.1 * random.normal(size=(2, 40)))
            blocks.append({"old": tuple(old), "new": tuple(1.2 * math.exp(shift) * new)})
        found = block_ratio(blocks, "new", "old")
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.2 <= found.high
    assert 0.92 <= covered / trials <= 0.98


def test_students_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=9)
    for confidence in (0.95, 0.995):
        exact = stats.t.interval(confidence, 8, values.mean(), values.std(ddof=1) / 3)
        assert mean_interval(values, confidence) == pytest.approx(exact, rel=1e-3)
