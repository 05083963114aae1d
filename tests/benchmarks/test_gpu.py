"""The order and the files of ``make gpu``; what its parts measure wants a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PartFile

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on the CPU with these parts in the place of its own; its exit code."""

    def call(*more: str, **parts: Callable[[argparse.Namespace, PartFile], None]) -> int:
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path), "--device", "cpu", *more])
        return gpu.main()

    return call


def broken(_: argparse.Namespace, file: PartFile) -> None:
    """One batch, then an error."""
    file.values["first"] = 1
    file.keep()
    raise RuntimeError("no memory")


def rest(_: argparse.Namespace, file: PartFile) -> None:
    """What ``broken`` left, and the second batch."""
    file.values["second"] = 2


def test_a_part_that_fails_does_not_stop_the_next_and_goes_on(run: Run, tmp_path: Path) -> None:
    assert run(latency=broken, parity=rest) == 1
    kept = json.loads((tmp_path / "gpu_latency.json").read_text())
    assert (kept["complete"], kept["values"]) == (False, {"first": 1})
    assert json.loads((tmp_path / "gpu_parity.json").read_text())["complete"]
    assert run(latency=rest, parity=broken) == 0  # the second is done
    kept = json.loads((tmp_path / "gpu_latency.json").read_text())
    assert (kept["complete"], kept["values"]) == (True, {"first": 1, "second": 2})


def test_a_trial_is_not_taken_for_a_measurement(run: Run, tmp_path: Path) -> None:
    assert run("--smoke", latency=rest) == 0
    assert run(latency=lambda _, file: file.values.update(real=True)) == 0
    kept = json.loads((tmp_path / "gpu_latency.json").read_text())
    assert (kept["smoke"], kept["values"]) == (False, {"real": True})


def test_a_trial_writes_over_no_measurement(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(latency=rest) == 0
    before = (tmp_path / "gpu_latency.json").read_bytes()
    assert run("--smoke", latency=rest, parity=rest) == 1
    assert "'smoke': False}, this is" in capsys.readouterr().err
    assert (tmp_path / "gpu_latency.json").read_bytes() == before
    assert (tmp_path / "gpu_parity.json").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 3
    assert not list(tmp_path.iterdir())
