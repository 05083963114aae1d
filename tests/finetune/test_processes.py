"""The helper that other tests start processes with: how each of them ends is seen, and none is waited for forever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.finetune.processes import Child

Say = Callable[[object], None]


def telling(say: Say, *words: str) -> None:
    say((os.getpid(), os.environ["OMP_NUM_THREADS"], os.environ.get("RANK")))
    for word in words:
        say(word)


def failing(say: Say) -> None:
    say("about to")
    raise ZeroDivisionError


def sleeping(say: Say) -> None:
    say("awake")
    time.sleep(100)


def test_a_child_has_a_process_and_an_environment_of_its_own() -> None:
    one, other = Child(telling, "a", "b", given={"RANK": "1"}), Child(telling)
    assert (one.end(), other.end()) == (0, 0)
    assert one.heard == [(one.process.pid, "1", "1"), "a", "b"]
    assert other.heard == [(other.process.pid, "1", os.environ.get("RANK"))]
    assert len({os.getpid(), one.process.pid, other.process.pid}) == 3


def test_an_error_and_a_signal_are_no_success() -> None:
    failed, killed = Child(failing), Child(sleeping)
    assert failed.end() == 1
    assert failed.heard == ["about to"]
    assert killed.listen()
    killed.process.kill()
    assert killed.end() == -signal.SIGKILL


def test_a_child_that_hangs_is_ended() -> None:
    child = Child(sleeping)
    assert child.listen()
    with pytest.raises(TimeoutError, match=r"said \['awake'\] and then nothing for 0 seconds"):
        child.end(0.4)
    child.process.join(10.0)
    assert child.process.exitcode == -signal.SIGKILL
