"""The finetuning loop: MMD^2 through the whole sampling chain; Aiello, Valsesia and Magli 2023, arXiv 2301.07969."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmd_export.errors import MmdExportError
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.files import clear_write_errors
from mmd_finetune.interrupts import Interrupts
from mmd_finetune.reference import Reference
from mmd_finetune.run_folder import RunFolder, RunResult
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import Progress, TuningState
from mmd_finetune.task import SELECTION_SEED, Task, prepare


@dataclass(frozen=True)
class Report:
    """One iteration, for an observer. ``held_out`` is the newest distance, ``best`` the lowest so far."""

    iteration: int
    iterations: int
    loss: float | None
    held_out: float
    best: float
    seconds: float


Observer = Callable[[Report], None]


def tune(settings: FinetuneSettings, *, resume: bool = False, observer: Observer | None = None) -> RunResult:
    """Tune ``settings.model`` for one step budget and leave a run folder.

    With ``resume`` a run that was killed continues to the same weights, a finished one returns its result, and one that
    never began begins. Ctrl-C and SIGTERM save first, then raise KeyboardInterrupt.
    Raises UsageError for what cannot be run, and MmdExportError if the loss stops being finite or the disk is full.
    """
    folder = RunFolder(settings.out)
    folder.require_usable(resume=resume)
    task = prepare(settings)
    with clear_write_errors(settings.out, "the last saved state is kept"):
        folder.begin(task.record())
        if folder.is_finished:
            folder.drop_state()
            return folder.result()
        state = TuningState(task.base.denoiser, settings.learning_rate)
        if folder.state_file.is_file():
            state.load(folder.state_file)
        with Interrupts() as interrupts:
            _run(task, state, folder, observer or (lambda _: None), interrupts)
        return folder.finish(task, state)


def _run(task: Task, state: TuningState, folder: RunFolder, observe: Observer, interrupts: Interrupts) -> None:
    """Iterate until the end, the loss of patience, or an interrupt; save after every evaluation."""
    settings = task.settings
    if state.progress is None:
        state.progress, found = _first(task, state)
        folder.log(_line(state.progress, **found))
        state.save(folder.state_file)
    folder.trim_log(state.progress.iteration)
    held_out, sampler = folder.newest_held_out(), task.sampler(state.denoiser)
    started = time.perf_counter() - state.progress.seconds
    while not _is_done(settings, state.progress) and not interrupts.pending:
        iteration = state.progress.iteration
        losses, norm = _iterate(task, state, sampler, iteration)
        seconds = time.perf_counter() - started
        progress = state.progress = replace(state.progress, iteration=iteration + 1, seconds=seconds)
        due = progress.iteration % settings.evaluate_every == 0 or progress.iteration == settings.iterations
        found = _evaluate(task, state) if due else {}
        held_out, progress = found.get("held_out", held_out), state.progress
        loss = sum(losses.values()) / len(losses)
        folder.log(_line(progress, loss=loss, losses=losses, gradient=norm, **found))
        observe(
            Report(progress.iteration, settings.iterations, loss, held_out, progress.best_distance, progress.seconds)
        )
        if due:
            state.save(folder.state_file)
    if interrupts.pending:
        state.save(folder.state_file)
        raise KeyboardInterrupt


def _is_done(settings: FinetuneSettings, progress: Progress) -> bool:
    idle = (progress.iteration - progress.best_iteration) // settings.evaluate_every
    return progress.iteration >= settings.iterations or (settings.patience is not None and idle >= settings.patience)


def _first(task: Task, state: TuningState) -> tuple[Progress, dict[str, Any]]:
    """The untuned sampler's held-out distance, what tuning starts from; and the log's part."""
    started = time.perf_counter()
    found = _measure(task, state.average, 0)
    return Progress(0, found["held_out"], found["held_out"], 0, time.perf_counter() - started), found


def _iterate(
    task: Task, state: TuningState, sampler: UnrolledSampler, iteration: int
) -> tuple[dict[str, float], float]:
    """One Adam step; the MMD^2 by encoder, and the norm of the gradient before it was clipped."""
    settings = task.settings
    losses = encoder_losses(sampler, task.references, task.noise_of(iteration))
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    _require_finite("loss", values, iteration)
    state.optimiser.zero_grad()
    torch.stack(list(losses.values())).mean().backward()
    norm = float(nn.utils.clip_grad_norm_(state.parameters.values(), settings.clip_gradient))
    _require_finite("gradient", dict.fromkeys(values, norm), iteration)
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(settings, iteration)
    state.optimiser.step()
    state.update_average(settings.ema_decay)
    return values, norm


def encoder_losses(
    sampler: UnrolledSampler, references: tuple[Reference, ...], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """MMD^2 of one generated batch and the real images, by encoder; gradients reach the weights of every call."""
    images = sampler(**inputs)
    return {reference.encoder.name: reference.mmd2(images) for reference in references}


def learning_rate(settings: FinetuneSettings, iteration: int) -> float:
    """Constant, or lr (1 + cos(pi i / I)) / 2; Loshchilov and Hutter 2017, eq. 5 without restarts."""
    if settings.rate_decay == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * iteration / settings.iterations))


def _evaluate(task: Task, state: TuningState) -> dict[str, Any]:
    """The average on the fixed noise, for the log; keeps its weights if its held-out distance is the best so far."""
    progress = state.progress
    assert progress is not None
    found = _measure(task, state.average, progress.iteration)
    if found["held_out"] < progress.best_distance:
        state.best = state.snapshot()
        state.progress = replace(progress, best_distance=found["held_out"], best_iteration=progress.iteration)
    return found


def _measure(task: Task, denoiser: nn.Module, iteration: int) -> dict[str, Any]:
    """``held_out``, the distance, and the settings' further ``metrics``, all on the same samples."""
    images = task.samples(denoiser, SELECTION_SEED)
    distance = task.held_out_distance(images)
    _require_finite("held-out distance", {task.holdout.name: distance}, iteration)
    return {"held_out": distance, **task.further_metrics(images)}


def _require_finite(what: str, by_encoder: dict[str, float], iteration: int) -> None:
    bad = [name for name, value in by_encoder.items() if not math.isfinite(value)]
    if bad:
        raise MmdExportError(
            f"iteration {iteration}: the {what} is {by_encoder[bad[0]]} (encoder {', '.join(bad)}); the last saved "
            "state is kept; start again into another --out with a lower --lr"
        )


def _line(progress: Progress, **values: Any) -> dict[str, Any]:
    return {"iteration": progress.iteration, **values, "seconds": round(progress.seconds, 3)}
