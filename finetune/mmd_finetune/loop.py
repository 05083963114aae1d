"""The finetuning loop: MMD^2 through the whole sampling chain; Aiello, Valsesia and Magli 2023, arXiv 2301.07969."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmd_export.errors import MmdExportError, NotAvailableError, UsageError, is_out_of_memory
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.compute import full_float32
from mmd_finetune.files import clear_write_errors
from mmd_finetune.interrupts import Interrupts, StoppedError, sigterm_as_interrupt
from mmd_finetune.noise_ahead import NoiseAhead
from mmd_finetune.objective import add_gradient, blamed, require_same_gradient
from mmd_finetune.run_folder import RunFolder, RunResult, differences
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import Progress, TuningState
from mmd_finetune.task import REPORT_SEED, SELECTION_SEED, Task, prepare
from mmd_finetune.trainable import RATE, clip_gradients
from mmd_finetune.world import open_world


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

GO_ON = (
    "the last good state is kept: --resume --finish ends with the best weights so far, or start again into another "
    "--out with a lower --lr"
)
UNTUNED = "the model gives it before any tuning; choose another --holdout, --steps or --sampler"
CURVE_SECONDS = 60.0


class NotFiniteError(MmdExportError):
    """A loss, a gradient or a distance is NaN or infinite."""


def tune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    finish: bool = False,
    observer: Observer | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> RunResult:
    """Tune ``settings.model`` for one step budget and leave a run folder.

    With ``resume`` a run that was killed continues to the same weights, a finished one returns its result, and one that
    never began begins; with ``finish`` too it is not tuned on: the best average so far becomes its result. Ctrl-C and
    SIGTERM save first, then raise KeyboardInterrupt. Of several processes (torchrun) each does its share of every
    batch; the first one writes, calls ``observer`` after every iteration and tells ``notify`` of what takes a while
    besides, once the run has been accepted.
    An error of an iteration, such as memory that ran out, is raised when the state is saved, too; ``resume`` then takes
    another ``micro_batch_size``.
    Raises UsageError for what cannot be run, and MmdExportError if the loss stops being finite or the disk is full.
    """
    if finish and not resume:
        raise UsageError("--finish ends a run that was stopped; give --resume with it")
    place = RunFolder(settings.out)
    with sigterm_as_interrupt(), open_world(settings.device) as world, closing(place) as folder, full_float32():
        world.first_does(lambda: folder.require_usable(settings, resume=resume, finish=finish))
        task = prepare(settings, world)
        _require_same(task)
        with folder.kept_once_saved(), clear_write_errors(settings.out, folder.kept):
            if result := world.first_does(lambda: _begin(folder, task)):
                return result
            state = TuningState(task.trainable(), settings.learning_rate, settings.plan_learning_rate)
            sampler = task.tuning_sampler(state.denoiser)  # before loading: it sets the weights' memory format
            if settings.compile:
                world.together(lambda: require_same_gradient(task, state.denoiser, sampler))
            state.share(world)
            if world.first_does(folder.state_file.is_file):
                state.load(folder.state_file, world)
            if not finish:
                devices = [task.device] if task.device.type == "cuda" else []
                with Interrupts(patient=world.size > 1) as interrupts, torch.random.fork_rng(devices):
                    _run(Run(task, state, sampler, folder, observer or (lambda _: None), notify), interrupts)
            return _finish(folder, task, state)


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    task: Task
    state: TuningState
    sampler: UnrolledSampler
    folder: RunFolder
    observe: Observer
    notify: Callable[[str], None]

    def say(self, text: str) -> None:
        """To ``notify``, in the first process."""
        if self.task.world.is_first:
            self.notify(text)

    def save(self) -> None:
        """In the first process; all learn if it failed."""
        self.task.world.first_does(lambda: self.state.save(self.folder.state_file))

    def draw(self) -> None:
        """The curve so far, every minute at most."""
        self.task.world.first_does(lambda: self.folder.draw_curve(after=CURVE_SECONDS))

    def save_stopped(self) -> None:
        """The state of the iterations that are done, if it is good, and their curve, where a run ends early."""
        self.task.world.first_does(self._save_good)

    def _save_good(self) -> None:
        if self.state.is_finite:
            self.state.save(self.folder.state_file)
        self.folder.draw_curve()

    def log(self, **values: Any) -> None:
        """One line, in the first process; all learn if it failed."""
        progress = self.state.progress
        assert progress is not None
        line = {"iteration": progress.iteration, **values, "seconds": round(progress.seconds, 3)}
        self.task.world.first_does(lambda: self.folder.log(line))

    def tell(self, losses: dict[str, float], gradient: float, held_out: float, found: dict[str, Any]) -> None:
        """The log and the observer of an iteration; ``found`` is what was measured after it, if anything was."""
        task, progress = self.task, self.state.progress
        assert progress is not None
        loss = sum(task.loss_weights[name] * value for name, value in losses.items())
        self.log(loss=loss, losses=losses, gradient=gradient, **found)
        if task.world.is_first:
            done, of = progress.iteration, task.settings.iterations
            self.observe(Report(done, of, loss, held_out, progress.best_distance, progress.seconds))


def _begin(folder: RunFolder, task: Task) -> RunResult | None:
    """Make the folder or check that it is this run's; its result if it is finished."""
    folder.begin(task.record(), task.settings)
    if not folder.is_finished:
        return None
    folder.drop_state()
    return folder.result()


def _require_same(task: Task) -> None:
    """Raise UsageError if a process works on something else than the first one."""
    rank, own, first = task.world.rank, task.record(), task.world.first_does(task.record)

    def check() -> None:
        found = [each for each in differences(own, first) if each[0] != "data"]  # the first process alone reads them
        if found:
            name, mine, theirs = found[0]
            raise UsageError(f"{name} is {mine!r} in process {rank}, {theirs!r} in process 0; give both the same")

    task.world.together(check)


def _run(run: Run, interrupts: Interrupts) -> None:
    """Iterate until the end, the loss of patience, or an interrupt; save after every evaluation."""
    task, state, settings = run.task, run.state, run.task.settings
    if state.progress is not None:
        run.say(f"going on from iteration {state.progress.iteration} of {settings.iterations}")
    else:
        run.say("measuring the untuned sampler")
        state.progress, found = _first(task, state, interrupts.give_way)
        run.log(**found, loss_weights=dict(task.loss_weights))
        run.save()
    begun = state.progress
    started = time.perf_counter() - begun.seconds
    held_out = task.world.first_does(lambda: run.folder.continue_log(begun.iteration))
    with NoiseAhead(task.noise_of, settings.iterations) as noise_of:
        while not _is_done(settings, state.progress) and not task.world.any(interrupts.pending):
            with _saving_where_it_ends(run):
                if state.progress.unmeasured is None:
                    iteration = state.progress.iteration
                    losses, norm = iterate(
                        task, state, run.sampler, iteration, noise_of(iteration), give_way=interrupts.give_way
                    )
                    seconds = time.perf_counter() - started
                    state.progress = replace(
                        state.progress,
                        iteration=iteration + 1,
                        seconds=seconds,
                        unmeasured={"losses": losses, "gradient": norm},
                    )
                done, told = state.progress.iteration, state.progress.unmeasured
                assert told is not None
                due = done % settings.evaluate_every == 0 or done == settings.iterations
                found = _evaluate(task, state, interrupts.give_way) if due else {}
            state.progress = replace(state.progress, unmeasured=None)
            held_out = found.get("held_out", held_out)
            run.tell(told["losses"], told["gradient"], held_out, found)
            if due:
                run.save()
                run.draw()
    if task.world.any(interrupts.pending):
        run.save_stopped()
        raise KeyboardInterrupt


@contextmanager
def _saving_where_it_ends(run: Run) -> Iterator[None]:
    """Save what is whole where an iteration or an evaluation fails or heeds a signal: iterations, but for that one.

    What only one of several processes knows of is left to the last saved state: the others would wait for this one.
    """
    try:
        yield
    except (NotFiniteError, StoppedError):
        run.save_stopped()
        raise
    except OSError:  # it was the disk
        raise
    except Exception as error:
        if run.task.world.size > 1 or not run.state.is_whole:
            raise
        run.save_stopped()
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise NotAvailableError(
            f"out of memory: {reason}; the state is saved: pass --resume with a --micro-batch-size below "
            f"{run.task.settings.micro_batch_size or run.task.settings.batch_size}, or free memory"
        ) from error


def _finish(folder: RunFolder, task: Task, state: TuningState) -> RunResult:
    """All sample, the first process measures and writes."""
    state.average.load_state_dict(state.best)
    shipped = task.shipped(state.average)
    before, after = (task.samples(net, REPORT_SEED) for net in (task.trainable(), shipped))
    return task.world.first_does(lambda: folder.finish(task, state, shipped, before, after))


def _is_done(settings: FinetuneSettings, progress: Progress) -> bool:
    if progress.unmeasured is not None:
        return False
    idle = (progress.iteration - progress.best_iteration) // settings.evaluate_every
    return progress.iteration >= settings.iterations or (settings.patience is not None and idle >= settings.patience)


def _first(task: Task, state: TuningState, give_way: Callable[[], None]) -> tuple[Progress, dict[str, Any]]:
    """The untuned sampler's held-out distance, what tuning starts from; and the log's part."""
    started = time.perf_counter()
    found = _measure(task, state.average, 0, give_way)
    return Progress(0, found["held_out"], found["held_out"], 0, time.perf_counter() - started), found


def iterate(
    task: Task,
    state: TuningState,
    sampler: UnrolledSampler,
    iteration: int,
    noise: dict[str, Tensor] | None = None,
    *,
    give_way: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], float]:
    """One Adam step; the MMD^2 by encoder, and the norm of the gradient before it was clipped.

    ``give_way`` is called before every micro-batch; what it or this function raises leaves ``state`` as it was.
    """
    settings, noise = task.settings, noise or task.noise_of(iteration)
    state.optimiser.zero_grad()
    losses = add_gradient(task, sampler, noise, iteration, give_way=give_way)
    values = {name: float(loss) for name, loss in losses.items()}
    _require_finite("loss", values, iteration)
    task.world.sum_gradients(state.parameters.values())
    norm = clip_gradients(state.optimiser.param_groups, settings.clip_gradient)
    if not math.isfinite(norm):
        _require_finite("gradient", dict.fromkeys(blamed(task, sampler, noise, iteration), norm), iteration)
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(settings, iteration) * group[RATE]
    with state.changing():
        state.optimiser.step()
        state.update_average(settings.ema_decay)
    return values, norm


def learning_rate(settings: FinetuneSettings, iteration: int) -> float:
    """Constant, or lr (1 + cos(pi i / I)) / 2; Loshchilov and Hutter 2017, eq. 5 without restarts."""
    if settings.rate_decay == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * iteration / settings.iterations))


def _evaluate(task: Task, state: TuningState, give_way: Callable[[], None]) -> dict[str, Any]:
    """The average on the fixed noise, for the log; keeps its weights if its held-out distance is the best so far."""
    progress = state.progress
    assert progress is not None
    found = _measure(task, state.average, progress.iteration, give_way)
    if found["held_out"] < progress.best_distance:
        state.best = state.snapshot()
        state.progress = replace(progress, best_distance=found["held_out"], best_iteration=progress.iteration)
    return found


def _measure(task: Task, denoiser: nn.Module, iteration: int, give_way: Callable[[], None]) -> dict[str, Any]:
    """For the log: ``held_out``, the distance that decides, those of all held-out encoders, metrics and intervals."""
    images = task.samples(denoiser, SELECTION_SEED, give_way=give_way)
    judged = task.world.first_does(lambda: task.judge(images))
    distances = {encoder: found["frechet"].value for encoder, found in judged.items()}
    _require_finite("held-out distance", distances, iteration, GO_ON if iteration else UNTUNED)
    further = {
        encoder: {name: found[name].value for name in task.settings.metrics if name in found}
        for encoder, found in judged.items()
    }
    metrics = {"metrics": further[task.holdout.name], "metrics_by_encoder": further} if task.settings.metrics else {}
    intervals = {
        encoder: {name: [each.low, each.high] for name, each in found.items()} for encoder, found in judged.items()
    }
    return {
        "held_out": distances[task.holdout.name],
        "held_out_by_encoder": distances,
        **metrics,
        "intervals": intervals,
    }


def _require_finite(what: str, by_encoder: dict[str, float], iteration: int, next_move: str = GO_ON) -> None:
    bad = [name for name, value in by_encoder.items() if not math.isfinite(value)]
    if bad:
        raise NotFiniteError(
            f"iteration {iteration}: the {what} is {by_encoder[bad[0]]} (encoder {', '.join(bad)}); {next_move}"
        )
