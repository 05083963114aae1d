"""``mmd-export finetune``: settings from options, a TOML file and the run that goes on; then the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmd_export.runtime import uninstalled
from mmd_finetune.loop import tune
from mmd_finetune.progress import ProgressBar
from mmd_finetune.run_folder import RunFolder, RunResult, earlier_settings
from mmd_finetune.settings import make_settings
from mmd_finetune.tensorboard import FOLDER as EVENTS
from mmd_finetune.tensorboard import TensorBoard
from mmd_finetune.world import is_first_process


def finetune(
    given: Mapping[str, Any],
    config: Path | None,
    *,
    resume: bool,
    finish: bool,
    tensorboard: bool,
    notify: Callable[[str], None],
) -> tuple[RunResult, str] | None:
    """The result and the precision that was tuned; None in every process but the first of several.

    ``given`` are settings by name, None for those that were not given; they win over ``config``, and both over those of
    the run that goes on with ``resume``. Of a finished run this is the result that it has.
    """
    out, earlier = given["out"], None
    if resume and out is not None:
        earlier = earlier_settings(out)
        if earlier is None and config is None and given.get("model") is None:
            found = RunFolder(out).finished()
            return found if is_first_process() else None
    settings = make_settings(given, config, earlier)
    recorded = (tensorboard or (resume and _goes_on(settings.out, notify))) and is_first_process()
    with ProgressBar() as bar, TensorBoard(settings.out, bar) if recorded else nullcontext(bar) as observer:
        result = tune(settings, resume=resume, finish=finish, observer=observer, notify=notify)
    return (result, settings.precision) if is_first_process() else None


def _goes_on(run: Path, notify: Callable[[str], None]) -> bool:
    """Whether an unfinished run has TensorBoard events that can go on."""
    if RunFolder(run).is_finished or not (run / EVENTS).is_dir():
        return False
    if lacking := uninstalled(("tensorboard",)):
        notify(f"warning: {lacking} is not installed, so the events of the run do not go on")
    return not lacking


def facts(result: RunResult) -> dict[str, Any]:
    """``result`` for ``--json``."""
    return asdict(result) | {"folder": str(result.folder)}
