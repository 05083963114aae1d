"""A run on disk. While tuning: settings, log, state. At the end it is a diffusers folder too, and the state goes.

``unet/`` is renamed into place last: a run folder is finished exactly if it has one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from mmd_export.checkpoint import PLAN_FILE, SAFETENSORS
from mmd_export.errors import UsageError, one_line
from mmd_export.folders import read_object, require_writable, staged_file, sync
from mmd_export.tuned_precision import QUANTISATION_FILE
from mmd_finetune.card import model_card
from mmd_finetune.curve import draw_curve
from mmd_finetune.files import append_json_line, read_json_lines, write_atomically, write_json
from mmd_finetune.metrics.bootstrap import Measured
from mmd_finetune.setting_names import flag_of
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import Task
from mmd_finetune.trainable import Trainable

Interval: TypeAlias = tuple[float | None, float | None]

SHEET_IMAGES = 100
GIVEN = "resume.json"  # the settings with the paths of this machine, while a run is not finished
MAY_DIFFER = ("micro_batch_size", "base_model")  # rounding; where the same weights were found


def form_of(distance: float) -> str:
    """How a distance is shown: with two decimals, below 0.1 with three digits; the scale is that of an encoder."""
    return "#.3g" if 0.0 < abs(distance) < 0.1 else ".2f"


@dataclass(frozen=True)
class RunResult:
    """What a run reached: held-out Frechet distances on noise that was used for neither tuning nor choosing.

    ``held_out_before`` and ``held_out_after`` are those of the encoder that decided; ``held_out`` has all of them, by
    encoder, as (before, after), and ``held_out_intervals`` their 95 % intervals, as ((low, high), (low, high)).
    ``metrics`` are the further ones of the settings on the same samples: encoder -> name -> ``before`` and ``after``,
    each with ``value``, ``low`` and ``high``.
    """

    folder: Path
    iterations: int
    best_iteration: int
    held_out_before: float
    held_out_after: float
    held_out: dict[str, tuple[float, float]]
    seconds: float
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out_intervals: dict[str, tuple[Interval, Interval]] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, tuple[str, str]]:
        """The held-out distances before and after as text with their intervals; the encoder that decided first."""
        unknown: Interval = (None, None)
        told = {}
        for name, values in self.held_out.items():
            intervals = self.held_out_intervals.get(name, (unknown, unknown))
            before, after = (
                Measured(value, low, high).told(form_of(value))
                for value, (low, high) in zip(values, intervals, strict=True)
            )
            told[name] = before, after
        return told


class RunFolder:
    """The files of the run at ``place``; ``close`` lets other processes have it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lock: int | None = None
        self._made = False
        self._drawn = time.monotonic()
        self.state_file = place / "state.safetensors"
        self._settings = place / "settings.json"
        self._given = place / GIVEN
        self._log = place / "log.jsonl"
        self._result = place / "result.json"
        self._final = place / ".final"

    @property
    def is_finished(self) -> bool:
        """The tuned weights are in place."""
        return (self.place / "unet").is_dir()

    def require_usable(self, settings: FinetuneSettings, *, resume: bool, finish: bool = False) -> None:
        """Raise UsageError if something stands at ``place`` that this run may not touch, or nothing it could end."""
        if not self.place.exists() and not self.place.is_symlink():
            if finish:
                raise UsageError(f"{self.place} does not exist; --finish needs the folder of a run that was stopped")
            require_writable(self.place)
            return
        if not resume:
            next_move = "pass --resume to continue it, or " if self._settings.is_file() else ""
            raise UsageError(f"{self.place} already exists; {next_move}choose another --out")
        if not self.place.is_dir():
            raise UsageError(f"{self.place} is a file; --resume needs the folder of a run")
        begun = self._settings.is_file() or all(entry.name.endswith(".partial") for entry in self.place.iterdir())
        if not begun:
            raise UsageError(
                f"{self.place} is not the folder of a run (settings.json is missing); choose another --out"
            )
        self._take()
        if self._settings.is_file():
            self._require_same({"settings": settings.public()})
        if finish and not self.is_finished and not self.state_file.is_file():
            raise UsageError(f"{self.place} holds no saved state that --finish could end with; leave --finish out")

    def begin(self, record: Mapping[str, Any], settings: FinetuneSettings) -> None:
        """Make the folder, or check that it belongs to the same run; raises UsageError that names what differs."""
        self._made = not self.place.exists()
        self.place.mkdir(parents=True, exist_ok=True)
        self._take()
        for left in self.place.glob(".*.partial*"):  # by a kill while a file was written
            left.unlink()
        if self._settings.is_file():
            self._require_same(record)
        else:
            write_json(self._settings, record)
        if not self.is_finished:
            write_json(self._given, settings.model_dump(mode="json", exclude={"out"}))

    def kept(self) -> str:
        """What a run that ends here leaves, and the next move."""
        if self.state_file.is_file() or not self._made:
            return "the last saved state is kept; free the cause and pass --resume"
        return "nothing was saved yet; free the cause and run again"

    @contextmanager
    def kept_once_saved(self) -> Iterator[None]:
        """Remove a folder that ``begin`` made if the block ends before a state was saved: nothing to resume."""
        try:
            yield
        except BaseException:
            if self._made and not self.state_file.is_file():
                shutil.rmtree(self.place, ignore_errors=True)
            raise

    def _take(self) -> None:
        """Lock the folder against other live processes until ``close``; a killed process holds nothing.

        Nothing is locked on Windows and on file systems without locks.
        """
        if self._lock is not None or os.name == "nt":
            return
        import fcntl

        folder = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(folder)
            if isinstance(error, BlockingIOError):
                raise UsageError(
                    f"{self.place} is being tuned by another process; let it end, or choose another --out"
                ) from error
            return
        self._lock = folder

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _require_same(self, record: Mapping[str, Any]) -> None:
        """Raise UsageError unless ``settings.json`` says the same; of its parts, those that ``record`` has."""
        try:
            known = json.loads(self._settings.read_text(encoding="utf-8"))
            if record.keys() == {"settings"}:
                known = {"settings": known["settings"]}
            found = differences(known, json.loads(json.dumps(record)))
            found = [each for each in found if each[0] not in MAY_DIFFER]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self._settings} is damaged ({error}); choose another --out") from error
        if found:
            causes = [each for each in found if each[0] in FinetuneSettings.model_fields] or found[:1]
            told = [f"{_shown(name)} was {was!r}, is now {is_now!r}" for name, was, is_now in causes]
            values = "the old value" if len(told) == 1 else "the old values"
            raise UsageError(f"--resume {self.place}: {'; '.join(told)}; give {values}, or choose another --out")

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        append_json_line(self._log, line)

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines of ``log.jsonl``."""
        return read_json_lines(self._log)

    def draw_curve(self, after: float = 0.0) -> None:
        """``curve.png`` of the log so far, if none was drawn, nor the folder opened, in the last ``after`` seconds."""
        if time.monotonic() - self._drawn < after:
            return
        self._drawn = time.monotonic()
        with staged_file(self.place / "curve.png") as partial:
            draw_curve(self.lines(), partial)

    def trim_log(self, iteration: int) -> None:
        """Drop what a kill left behind the last saved state: it is done again."""
        kept = {line["iteration"]: line for line in self.lines() if line["iteration"] <= iteration}
        write_atomically(self._log, "".join(json.dumps(line) + "\n" for line in kept.values()).encode())

    def continue_log(self, iteration: int) -> float:
        """Trim the log to ``iteration``; the last held-out distance in it."""
        self.trim_log(iteration)
        return float(next(line["held_out"] for line in reversed(self.lines()) if "held_out" in line))

    def finished(self) -> tuple[RunResult, str]:
        """The result and the precision of a run that is finished; raises UsageError that says what there is instead."""
        if not self.place.exists():
            raise UsageError(f"--resume {self.place} does not exist; name a run folder, or give a MODEL to begin one")
        if not self.is_finished or not self._result.is_file():
            raise UsageError(f"--resume {self.place} holds no {GIVEN}; give all settings of the run")
        settings = read_object(self._settings, "--resume", "choose another --out")["settings"]
        return self.result(), settings["precision"]

    def result(self) -> RunResult:
        """The result of a finished run."""
        values = json.loads(self._result.read_text(encoding="utf-8"))
        pairs = {name: (before, after) for name, (before, after) in values.pop("held_out").items()}
        intervals = {
            name: (tuple(before), tuple(after))
            for name, (before, after) in values.pop("held_out_intervals", {}).items()
        }
        return RunResult(folder=self.place, held_out=pairs, held_out_intervals=intervals, **values)

    def finish(self, task: Task, state: TuningState, shipped: Trainable, before: Tensor, after: Tensor) -> RunResult:
        """Measure the samples, write everything beside, rename it into place, ``unet`` last, and drop the state.

        Args:
            task: of the run.
            state: at its end.
            shipped: the best average, as ``Task.shipped`` gives it.
            before: images (N, C, H, W) of the untuned sampler.
            after: those of ``shipped``.
        """
        assert state.progress is not None
        progress = state.progress
        sides = task.judge(before), task.judge(after)
        distances = {name: [side[name]["frechet"] for side in sides] for name in sides[0]}
        held_out = {name: (first.value, last.value) for name, (first, last) in distances.items()}
        result = RunResult(
            folder=self.place,
            iterations=progress.iteration,
            best_iteration=progress.best_iteration,
            held_out_before=held_out[task.holdout.name][0],
            held_out_after=held_out[task.holdout.name][1],
            held_out=held_out,
            seconds=round(progress.seconds, 3),
            metrics=_metrics(task.settings.metrics, *sides),
            held_out_intervals={
                name: ((first.low, first.high), (last.low, last.high)) for name, (first, last) in distances.items()
            },
        )
        shutil.rmtree(self._final, ignore_errors=True)
        self._final.mkdir()
        _write_sheet(before, self._final / "before.png")
        _write_sheet(after, self._final / "after.png")
        draw_curve(self.lines(), self._final / "curve.png")
        summary = {key: value for key, value in asdict(result).items() if key != "folder"}
        write_json(self._final / "result.json", summary)
        write_json(self._final / PLAN_FILE, shipped.plan().to_dict())
        if shipped.emulation is not None:
            write_json(self._final / QUANTISATION_FILE, shipped.emulation.record.to_dict())
        card = model_card(task.record(), task.base, shipped.plan(), result)
        write_atomically(self._final / "README.md", card.encode())
        _write_diffusers(task, shipped, self._final)
        self._publish()
        return result

    def _publish(self) -> None:
        self._given.unlink(missing_ok=True)  # its paths are of this machine, the folder may go to others
        entries = sorted(self._final.iterdir(), key=lambda entry: (entry.name == "unet", entry.name))
        for entry in entries:
            goal = self.place / entry.name
            if goal.is_dir():
                shutil.rmtree(goal)  # left by a kill in the middle of an earlier _publish
            entry.replace(goal)
        sync(self.place)
        self.drop_state()

    def drop_state(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self._final, ignore_errors=True)
        self.state_file.unlink(missing_ok=True)
        self._given.unlink(missing_ok=True)


def earlier_settings(place: Path) -> FinetuneSettings | None:
    """Those of the unfinished run at ``place``, as the command line gave them; None if it has none.

    Raises UsageError if their file is damaged, or of another release.
    """
    path, advice = place / GIVEN, "give all settings again"
    if not path.is_file():
        return None
    values = read_object(path, "--resume", advice)
    try:
        return FinetuneSettings(**values, out=place)
    except (ValidationError, TypeError) as error:
        raise UsageError(f"--resume {path} is of another release ({one_line(error)}); {advice}") from error


def _metrics(
    names: Sequence[str], before: Mapping[str, Mapping[str, Measured]], after: Mapping[str, Mapping[str, Measured]]
) -> dict[str, dict[str, Any]]:
    """By encoder and name, where both sides could be measured; empty without names."""
    return {
        encoder: {
            name: {"before": before[encoder][name].to_dict(), "after": found[name].to_dict()}
            for name in names
            if name in found and name in before[encoder]
        }
        for encoder, found in after.items()
        if names
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names at which two records of ``Task.record`` differ, with both values; settings first, they are the causes."""
    sides = [
        {key: value for key, value in side.items() if key != "settings"} | side["settings"] for side in (one, other)
    ]
    names = sorted(set().union(*sides), key=lambda name: ("sha256" in name, name))
    pairs = ((name, *(side.get(name) for side in sides)) for name in names)
    return [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]


def _shown(name: str) -> str:
    """A setting as its option; a key that has none, and what was found out, as it is called."""
    return flag_of(name) if name in FinetuneSettings.model_fields else name


def _write_sheet(images: Tensor, path: Path) -> None:
    from mmd_export.pictures import save_grid

    save_grid(images[:SHEET_IMAGES].cpu().numpy(), path)


def _write_diffusers(task: Task, shipped: Trainable, folder: Path) -> None:
    """``unet/`` and ``scheduler/`` with the configs of the base, byte for byte, and the best average's weights."""
    for part in ("unet", "scheduler"):
        (folder / part).mkdir()
    for name, content in task.base.configs.items():
        write_atomically(folder / name, content)
    weights = {
        name: tensor.contiguous().cpu() for name, tensor in shipped.network.get_submodule("unet").state_dict().items()
    }
    write_atomically(folder / "unet" / SAFETENSORS, save(weights, {"format": "pt"}))
