"""Latency by a fake clock: a slower candidate is found, an equal one is not, and the interval keeps its promise."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmd_export.errors import MmdExportError, UsageError
from mmd_export.latency import LatencyReport, Warmup, measure, require_rounds


class Machine:
    """A clock that only candidates move: each takes its own time, times what the machine does at that moment."""

    def __init__(self, seed: int = 0, jitter: float = 0.0, drift: float = 0.0) -> None:
        self.now, self.jitter, self.drift = 0.0, jitter, drift
        self.random = np.random.default_rng(seed)
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            slow = 1.0 + self.drift * len(self.log)
            self.now += seconds * slow * float(np.exp(self.jitter * self.random.normal()))

        return run


def report(**seconds: list[float]) -> LatencyReport:
    return LatencyReport(
        {name: tuple(values) for name, values in seconds.items()}, {name: Warmup(10, True) for name in seconds}, {}
    )


def compare(slower: float, *, rounds: int, seed: int = 0, jitter: float = 0.1, drift: float = 0.001) -> LatencyReport:
    machine = Machine(seed, jitter, drift)
    candidates = {"old": machine.candidate("old", 0.01), "new": machine.candidate("new", 0.01 * slower)}
    return measure(candidates, rounds, clock=machine.clock, seed=seed)


def test_too_few_rounds_give_no_interval() -> None:
    few = report(a=[1.0] * 5, b=[2.0] * 5)
    assert few.ratio("b", "a").low is None
    assert few.ratio("b", "a").median == 2.0
    assert any("no interval: it takes 6 rounds, this run has 5" in note for note in few.notes)


def test_a_noisy_machine_is_said_to_be_so_with_the_rounds_that_would_do() -> None:
    noisy, quiet = compare(1.0, rounds=40, jitter=0.4), compare(1.0, rounds=40, jitter=0.02)
    (note,) = (note for note in noisy.notes if "too noisy to conclude" in note)
    rounds = int(note.split("about ")[1].split(" rounds")[0])
    assert rounds > 40
    assert not any("too noisy" in note for note in quiet.notes)
    enough = compare(1.0, rounds=3 * rounds, jitter=0.4)
    assert not any("too noisy" in note for note in enough.notes)


@pytest.mark.parametrize("rounds", [20, 100])
def test_the_interval_covers_the_true_ratio_about_95_times_in_100(rounds: int) -> None:
    random, covered, trials = np.random.default_rng(1), 0, 400
    for trial in range(trials):
        old = np.exp(0.2 * random.normal(size=rounds))
        new = 1.3 * np.exp(0.2 * random.normal(size=rounds))
        found = report(old=old.tolist(), new=new.tolist()).ratio("new", "old", resamples=500, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.3 <= found.high
    assert 0.91 <= covered / trials <= 0.985


def test_the_ratio_pairs_the_times_of_one_round() -> None:
    machine = [1.0, 10.0, 100.0, 3.0, 7.0, 50.0, 2.0]
    found = report(a=machine, b=[2 * seconds for seconds in machine]).ratio("b", "a")
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_every_round_runs_each_candidate_once_in_changing_order() -> None:
    machine = Machine()
    candidates = {name: machine.candidate(name, 1.0) for name in "abc"}
    found = measure(candidates, rounds=60, warmup=0, clock=machine.clock)
    rounds = [tuple(machine.log[start : start + 3]) for start in range(0, 180, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6
    again = Machine()
    measure({n: again.candidate(n, 1.0) for n in "abc"}, rounds=60, warmup=0, clock=again.clock)
    assert again.log == machine.log
    assert found.rounds == 60


def test_warming_up_ends_when_two_windows_agree() -> None:
    machine = Machine()
    times = iter([1.0] * 4 + [0.5] * 3 + [0.1] * 100)

    def settling() -> None:
        machine.now += next(times)

    found = measure({"a": settling}, rounds=3, clock=machine.clock)
    assert found.warmup["a"] == Warmup(15, True)
    assert found.seconds["a"] == pytest.approx([0.1] * 3)


def test_warming_up_gives_up_and_says_so() -> None:
    machine, step = Machine(), iter(range(1, 100))

    def growing() -> None:
        machine.now += 1.5 ** next(step)

    found = measure({"a": growing}, rounds=1, warmup=12, clock=machine.clock)
    assert found.warmup["a"] == Warmup(12, False)
    assert any("not yet stable within 10 % after 12 warm-up runs" in note for note in found.notes)


def test_warming_up_takes_a_tenth_of_the_time_at_most() -> None:
    """And the run that it ends with."""
    machine = Machine()

    def slow() -> None:
        machine.now += 2.0

    found = measure({"a": slow, "b": slow}, rounds=1, clock=machine.clock, seconds=100.0)
    assert found.warmup == {"a": Warmup(3, False), "b": Warmup(3, False)}
    found = measure({"a": slow}, rounds=1, clock=machine.clock, seconds=1.0)
    assert found.warmup == {"a": Warmup(1, False)}


@pytest.mark.parametrize(
    ("rounds", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)]
)
def test_a_percentile_needs_enough_rounds(rounds: int, p90: bool, p99: bool) -> None:
    found = report(a=[float(second) for second in range(1, rounds + 1)])
    summary = found.summary("a")
    assert (summary.percentile(90) is not None, summary.percentile(99) is not None) == (p90, p99)
    assert any(note.startswith("no p99: it takes 100 rounds, this run has") for note in found.notes) != p99
    assert summary.median == pytest.approx((rounds + 1) / 2)
    assert summary.mean == pytest.approx((rounds + 1) / 2)


def test_too_few_rounds_for_a_percentile_are_refused_with_both_numbers() -> None:
    require_rounds(100, (50, 90, 99))
    with pytest.raises(UsageError, match="p99 takes at least 100 rounds, this run has 99"):
        require_rounds(99, (50, 90, 99))
    with pytest.raises(UsageError, match="percentile 95 is not reported"):
        require_rounds(500, (95,))


@pytest.mark.parametrize("percent", [50, 90])
def test_the_interval_of_a_percentile_covers_it(percent: float) -> None:
    random, covered, trials = np.random.default_rng(2), 0, 300
    exact = float(np.exp(0.3 * {50: 0.0, 90: 1.2815515655446004}[int(percent)]))
    for _ in range(trials):
        found = report(a=np.exp(0.3 * random.normal(size=100)).tolist()).summary("a").percentile(percent)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= exact <= found.high
    assert 0.89 <= covered / trials <= 0.99


def test_the_report_is_json_without_host_name_or_path() -> None:
    found = compare(1.1, rounds=10)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["summary"]["old"]["p99"] is None
    assert json.loads(text)["ratios"][0]["candidate"] == "new"
    environment = found.environment
    assert {"platform", "cpu", "cores", "python", "packages", "load_before", "load_after"} <= set(environment)
    assert not platform.node() or platform.node() not in json.dumps(dict(environment)).split('"')
    assert str(Path.cwd()) not in text
    assert str(Path.home()) + "/" not in text


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="0 candidates"):
        measure({}, rounds=1)
    with pytest.raises(UsageError, match="0 rounds"):
        measure({"a": lambda: None}, rounds=0)
    with pytest.raises(UsageError, match="'c' was not measured; measured: a, b"):
        report(a=[1.0], b=[1.0]).ratio("a", "c")
    with pytest.raises(MmdExportError, match=r"a took 0.0 s by this clock"):
        measure({"a": lambda: None}, rounds=1, clock=lambda: 5.0)


def test_what_a_candidate_raises_is_not_hidden() -> None:
    def broken() -> None:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        measure({"a": broken}, rounds=1)


def test_a_rest_comes_before_each_run_and_is_not_in_its_time() -> None:
    start = time.perf_counter()
    found = measure({"a": lambda: None, "b": lambda: None}, rounds=4, warmup=0, rest=0.02)
    assert time.perf_counter() - start >= 2 * 4 * 0.02
    assert found.summary("a").median < 0.02
