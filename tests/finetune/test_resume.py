"""Kill -9, a full disk, damaged state: the last good state is kept and the run ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import MmdExportError, UsageError
from mmd_finetune import features, files, loop, run_folder
from mmd_finetune.features import Encoder, load_encoder
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import prepare
from tests.finetune.processes import Child, tuning, tuning_on_a_small_disk
from tests.finetune.runs import changed, weights_of


def kill_after(settings: FinetuneSettings, iteration: int, pause: float) -> int:
    """Start or resume, wait for ``iteration`` and ``pause`` seconds, kill -9; the last iteration that was seen."""
    child = Child(tuning, settings)
    while child.listen() and child.heard[-1] < iteration:
        pass
    time.sleep(pause)
    child.process.kill()
    assert child.end() == -signal.SIGKILL
    last: int = max(child.heard)
    return last


def tune_here(settings: FinetuneSettings) -> None:
    """In this process, in one thread as in a child."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tune(settings)
    finally:
        torch.set_num_threads(threads)


def log_without_seconds(run: Path) -> list[str]:
    return [line.rsplit(', "seconds"', 1)[0] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.timeout(400)
def test_kill_9_at_three_moments_and_resume_end_bit_for_bit_the_same(
    tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    # Everything that could keep a position or a memory format of its own.
    settings = changed(
        tiny_settings,
        iterations=18,
        evaluate_every=3,
        eta=1.0,
        micro_batch_size=5,
        reference="batch",
        channels_last=True,
    )
    run = settings.out
    assert kill_after(settings, 4, 0.0) < 18  # behind the first evaluation, in the middle of an interval
    assert not (run / "unet").exists()
    with pytest.raises(UsageError):
        load_checkpoint(run)
    pauses = [random.uniform(0.0, 0.05) for _ in range(2)]
    kill_after(settings, 8, pauses[0])
    kill_after(settings, 11, pauses[1])  # near an evaluation and its save
    last = Child(tuning, settings)
    assert last.end() == 0
    assert 1 < last.heard[0] <= 16
    tune_here(changed(settings, out=tmp_path / "whole"))  # where strings are hashed in another way
    expected = weights_of(tmp_path / "whole")
    for name, tensor in weights_of(run).items():
        assert torch.equal(tensor, expected[name]), name
    assert log_without_seconds(run) == log_without_seconds(tmp_path / "whole")
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("moment", [1, 7])
def test_a_kill_while_the_run_is_published_is_made_good(
    moment: int, tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    replace, renamed = Path.replace, iter(range(100))

    def killed_in_the_middle(self: Path, target: Path) -> Path:
        if self.parent.name == ".final" and Path(target).parent.name == "run" and next(renamed) == moment:
            raise KilledError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_in_the_middle)
    with pytest.raises(KilledError):
        tune(tiny_settings)
    monkeypatch.undo()
    assert (tiny_settings.out / "README.md").exists()
    with pytest.raises(UsageError):  # weights come last: nothing half-written looks finished
        load_checkpoint(tiny_settings.out)
    tune(tiny_settings, resume=True)
    whole = tune(changed(tiny_settings, out=tmp_path / "whole"))
    for name, tensor in weights_of(whole.folder).items():
        assert torch.equal(tensor, weights_of(tiny_settings.out)[name])


def test_a_kill_between_the_weights_and_the_end_is_made_good(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "sync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings)
    monkeypatch.undo()
    assert (tiny_settings.out / "state.safetensors").exists()
    tune(tiny_settings, resume=True)
    assert not (tiny_settings.out / "state.safetensors").exists()
    assert not list(tiny_settings.out.glob(".*"))


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "half a settings file", "settings only"])
def test_resume_of_a_run_that_hardly_began(left: str, tiny_settings: FinetuneSettings) -> None:
    settings = changed(tiny_settings, iterations=1)
    if left != "nothing":
        settings.out.mkdir()
    if left == "half a settings file":
        (settings.out / ".settings.json.partial").write_text('{"set')
    if left == "settings only":
        files.write_json(settings.out / "settings.json", prepare(settings).record())
    assert tune(settings, resume=True).iterations == 1
    assert not list(settings.out.glob(".*"))


def stopped_after(iteration: int, settings: FinetuneSettings) -> None:
    def stop(report: loop.Report) -> None:
        if report.iteration == iteration:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(settings, observer=stop)


class Drawing(nn.Module):
    """Draws from torch's own generator: as an encoder it is refused, here it stands for whatever may draw in a run."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * (1.0 + 0.5 * torch.rand(len(images), 1))


def test_what_draws_from_torchs_generator_goes_on_where_it_was(
    tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Encoder:
        return Encoder("pixels", Drawing()) if name == "pixels" else load_encoder(name)

    monkeypatch.setattr(features, "load_encoder", load)
    monkeypatch.setattr(features, "_require_steady", lambda *_: None)
    settings = changed(tiny_settings, features=("pixels",), kernel="linear")
    torch.manual_seed(1)  # what the references draw is not the loop's
    stopped_after(3, settings)
    outside = torch.get_rng_state()
    torch.manual_seed(1)
    tune(settings, resume=True)
    assert torch.equal(torch.get_rng_state(), outside)  # the caller's generator is left alone by the loop
    torch.manual_seed(1)
    whole = tune(changed(settings, out=tmp_path / "whole"))
    assert all(torch.equal(t, weights_of(settings.out)[n]) for n, t in weights_of(whole.folder).items())


def test_a_log_line_cut_in_half_is_written_again(tiny_settings: FinetuneSettings) -> None:
    stopped_after(3, tiny_settings)
    with (tiny_settings.out / "log.jsonl").open("a") as log:
        log.write('{"iteration": 4, "lo')
    tune(tiny_settings, resume=True)
    assert [line.split(",")[0] for line in log_without_seconds(tiny_settings.out)] == [
        f'{{"iteration": {i}' for i in range(7)
    ]


@pytest.mark.parametrize("cut", [0, 100, 20_000])
def test_a_damaged_state_is_said(cut: int, tiny_settings: FinetuneSettings) -> None:
    stopped_after(3, tiny_settings)
    state = tiny_settings.out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"state\.safetensors cannot be read"):
        tune(tiny_settings, resume=True)


def test_damaged_settings_are_said(tiny_settings: FinetuneSettings) -> None:
    stopped_after(3, tiny_settings)
    (tiny_settings.out / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings\.json is damaged"):
        tune(tiny_settings, resume=True)


def test_a_full_disk_while_saving_keeps_the_state_before(
    tiny_settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[bytes] = []

    def full(self: TuningState, path: Path) -> None:
        assert self.progress is not None
        if self.progress.iteration == 4:
            saved.append(path.read_bytes())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    save = TuningState.save
    monkeypatch.setattr(TuningState, "save", full)
    with pytest.raises(MmdExportError, match=r"cannot write .*run: No space left on device; .* --resume") as caught:
        tune(tiny_settings)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert (tiny_settings.out / "state.safetensors").read_bytes() == saved[0]
    tune(tiny_settings, resume=True)
    whole = tune(changed(tiny_settings, out=tmp_path / "whole"))
    assert all(torch.equal(t, weights_of(tiny_settings.out)[n]) for n, t in weights_of(whole.folder).items())


def test_a_disk_that_really_refuses_is_one_line_and_no_half_file(tiny_settings: FinetuneSettings) -> None:
    stopped_after(3, tiny_settings)
    state = tiny_settings.out / "state.safetensors"
    before = state.read_bytes()
    assert len(before) > 20_000
    child = Child(tuning_on_a_small_disk, tiny_settings)
    assert child.end() == 1
    (said,) = child.heard
    assert "\n" not in said
    assert "File too large" in said
    assert state.read_bytes() == before
    assert not list(tiny_settings.out.glob(".*"))
    assert tune(tiny_settings, resume=True).iterations == 6
