"""Runs on a tiny model that Ctrl-C or SIGTERM stops: they end in order, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from mmd_finetune import interrupts, loop
from mmd_finetune.interrupts import Interrupts
from mmd_finetune.loop import Report, tune
from mmd_finetune.metrics import sampling
from mmd_finetune.run_folder import RunFolder
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.task import Task
from tests.finetune.runs import changed, log_of, same_weights, saved_iteration, without_seconds


def deliver(number: signal.Signals) -> None:
    """Call the handler. Real signals go to processes of their own (test_world.py, tests/cli/test_bad_input.py).

    Where executorch 1.5 is loaded, as the contract tests do, a signal ends the process with a segmentation fault.
    """
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_resume_ends_the_same(
    number: signal.Signals, tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(report: Report) -> None:
        if report.iteration == 3:
            deliver(number)

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings, observer=interrupt)
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert log_of(tiny_settings.out)[-1]["iteration"] == 3  # 3 is no evaluation: the signal made it save
    seen: list[int] = []
    said: list[str] = []
    tune(tiny_settings, resume=True, observer=lambda report: seen.append(report.iteration), notify=said.append)
    assert seen == [4, 5, 6]
    assert said == ["going on from iteration 3 of 6"]
    whole = tune(changed(tiny_settings, out=tmp_path / "whole"))
    assert same_weights(tiny_settings.out, whole.folder)
    assert without_seconds(log_of(tiny_settings.out)) == without_seconds(log_of(whole.folder))


def test_a_signal_between_micro_batches_saves_the_iterations_before(
    tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(tiny_settings, micro_batch_size=4)
    real, calls = Task.generator_seed, []

    def seed(self: Task, iteration: int, part: int) -> int:
        calls.append((iteration, part))
        if calls[-1] == (3, 0) and calls.count((3, 0)) == 1:
            deliver(signal.SIGTERM)
        return real(self, iteration, part)

    monkeypatch.setattr(Task, "generator_seed", seed)
    with pytest.raises(KeyboardInterrupt):
        tune(settings)
    assert calls[-1] == (3, 0)  # the second micro-batch was not begun
    assert saved_iteration(settings) == 3
    tune(settings, resume=True)
    assert same_weights(settings.out, tune(changed(settings, out=tmp_path / "whole")).folder)


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(
    tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = sampling.sampler_inputs, iter(range(100))

    def inputs(*arguments: Any) -> dict[str, Tensor]:
        if next(calls) == 4:  # of 16 samples in batches of 8: the untuned ones, iterations 2 and 4
            deliver(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(sampling, "sampler_inputs", inputs)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings)
    assert next(calls) == 5  # the second batch was not begun
    assert saved_iteration(tiny_settings) == 4
    assert log_of(tiny_settings.out)[-1]["iteration"] == 3
    tune(tiny_settings, resume=True)
    whole = tune(changed(tiny_settings, out=tmp_path / "whole"))
    assert same_weights(tiny_settings.out, whole.folder)
    assert without_seconds(log_of(tiny_settings.out)) == without_seconds(log_of(whole.folder))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the handler reads; ``now`` is set by the test."""
    fake = SimpleNamespace(now=100.0)
    fake.monotonic = lambda: fake.now
    monkeypatch.setattr(interrupts, "time", fake)
    return fake


def test_the_second_signal_stops_at_once(clock: SimpleNamespace) -> None:
    with Interrupts() as seen:
        deliver(signal.SIGINT)
        assert seen.pending
        clock.now += interrupts.ONE_SIGNAL
        with pytest.raises(KeyboardInterrupt):
            deliver(signal.SIGTERM)


def test_a_signal_that_comes_twice_at_once_is_one(clock: SimpleNamespace) -> None:
    with Interrupts() as seen:
        deliver(signal.SIGTERM)
        clock.now += 0.9 * interrupts.ONE_SIGNAL
        deliver(signal.SIGTERM)  # from the process group and once more from the parent that waits
        assert seen.pending
        clock.now += 0.2 * interrupts.ONE_SIGNAL  # counted from the first
        with pytest.raises(KeyboardInterrupt):
            deliver(signal.SIGTERM)


def test_of_several_processes_a_signal_never_stops_at_once(clock: SimpleNamespace) -> None:
    with Interrupts(patient=True) as seen:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            deliver(number)
            clock.now += 10.0 * interrupts.ONE_SIGNAL
        assert seen.pending


@pytest.mark.parametrize("place", ["prepare", "_begin", "_first"])
def test_sigterm_before_the_first_state_leaves_no_folder(
    place: str, tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        done = getattr(loop, place)

        def signalled(*arguments: Any) -> Any:
            if place == "_begin":
                done(*arguments)
            deliver(signal.SIGTERM)
            return done(*arguments)

        patch.setattr(loop, place, signalled)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny_settings)
    assert not tiny_settings.out.exists()
    assert signal.getsignal(signal.SIGTERM) == before
    tune(changed(tiny_settings, iterations=1))


def test_sigterm_while_the_result_is_measured_keeps_the_state(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda *_: deliver(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            tune(tiny_settings)
    assert tune(tiny_settings, resume=True, observer=lambda _: pytest.fail("it ran again")).iterations == 6
