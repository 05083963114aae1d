"""A run that goes on with its folder alone: which settings hold, and what is told while it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmd_export.commands.finetune import finetune
from mmd_export.errors import UsageError
from mmd_finetune import loop
from mmd_finetune.loop import Report, tune
from mmd_finetune.run_folder import RunResult
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.tensorboard import TensorBoard
from tests.finetune.runs import changed, events_of


def stop_at(iteration: int) -> Callable[[Report], None]:
    def observe(report: Report) -> None:
        if report.iteration == iteration:
            raise KeyboardInterrupt

    return observe


def go_on(say: Callable[[str], None] = lambda _: None, **given: Any) -> RunResult:
    found = finetune(given, None, resume=True, finish=False, tensorboard=False, notify=say)
    assert found is not None
    return found[0]


def test_a_run_goes_on_with_its_folder_alone(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    whole = tune(changed(tiny_settings, out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings, observer=stop_at(5))
    said: list[str] = []
    assert go_on(said.append, out=tiny_settings.out, model=None).held_out_after == whole.held_out_after
    assert said[0].startswith("going on from iteration")
    assert not (tiny_settings.out / "resume.json").exists()  # it has paths of this machine
    assert go_on(out=tiny_settings.out).held_out_after == whole.held_out_after
    with pytest.raises(UsageError, match="nowhere does not exist; name a run folder, or give a MODEL to begin one"):
        go_on(out=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds no resume\.json; give all settings of the run"):
        go_on(out=tmp_path / "empty")


def test_the_events_of_a_run_go_on_without_being_asked_for_again(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(KeyboardInterrupt), TensorBoard(tiny_settings.out, stop_at(5)) as observer:
        tune(tiny_settings, observer=observer)
    go_on(out=tiny_settings.out)
    assert [event.step for event in events_of(tiny_settings.out).Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_events_that_cannot_go_on_are_said(tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), TensorBoard(tiny_settings.out, stop_at(5)) as observer:
        tune(tiny_settings, observer=observer)
    monkeypatch.setattr("mmd_export.commands.finetune.uninstalled", lambda _: "tensorboard")
    said: list[str] = []
    go_on(said.append, out=tiny_settings.out)
    assert said[0] == "warning: tensorboard is not installed, so the events of the run do not go on"
    monkeypatch.undo()
    before = list((tiny_settings.out / "tensorboard").iterdir())
    go_on(**tiny_settings.model_dump())  # the whole command again, of a run that is finished
    assert list((tiny_settings.out / "tensorboard").iterdir()) == before


def test_options_win_over_those_of_the_folder_and_are_refused(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings, observer=stop_at(5))
    with pytest.raises(UsageError, match="--seed was 0, is now 7"):
        go_on(out=tiny_settings.out, seed=7)
    with pytest.raises(UsageError, match=r"--tune was 'all', is now 'none'; leave them out"):
        go_on(out=tiny_settings.out, tune="none")  # which makes no sense beside the settings of the run
    kept = (tiny_settings.out / "resume.json").read_text()
    (tiny_settings.out / "resume.json").write_text(kept.replace("{", '{"newer": 1,', 1))
    with pytest.raises(UsageError, match=r"resume\.json is of another release \(.*newer"):
        go_on(out=tiny_settings.out)
    (tiny_settings.out / "resume.json").write_text("{")
    with pytest.raises(UsageError, match=r"resume\.json is no JSON: .*; give all settings again"):
        go_on(out=tiny_settings.out)


def test_the_curve_is_drawn_while_the_run_goes_on(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CURVE_SECONDS", 0.0)
    drawn: list[bool] = []
    tune(tiny_settings, observer=lambda _: drawn.append((tiny_settings.out / "curve.png").is_file()))
    assert not drawn[0]
    assert drawn[-1]


def test_a_file_of_settings_wins_over_those_of_the_folder(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_settings, observer=stop_at(5))
    (tmp_path / "few.toml").write_text("seed = 7\n")
    with pytest.raises(UsageError, match="--seed was 0, is now 7"):
        finetune({"out": tiny_settings.out}, tmp_path / "few.toml", resume=True, finish=False, tensorboard=False,
                 notify=lambda _: None)  # fmt: skip
