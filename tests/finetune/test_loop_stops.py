"""Runs on a tiny model that are refused or fail: what they say, and that nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import MmdExportError, NotAvailableError, UsageError
from mmd_finetune import features, loop, objective
from mmd_finetune.features import Encoder, load_encoder
from mmd_finetune.files import write_json
from mmd_finetune.loop import NotFiniteError, Report, tune
from mmd_finetune.metrics.bootstrap import Measured
from mmd_finetune.run_folder import RunFolder
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import Task
from mmd_finetune.world import World
from tests.finetune.runs import changed, log_of, saved_iteration, weights_of


def test_out_that_exists_is_refused_before_any_work(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_settings.out.mkdir()
    (tiny_settings.out / "mine.txt").write_text("precious")
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=r"run already exists; choose another --out"):
        tune(tiny_settings)
    with pytest.raises(UsageError, match=r"is not the folder of a run \(settings\.json is missing\)"):
        tune(tiny_settings, resume=True)
    assert [path.name for path in tiny_settings.out.iterdir()] == ["mine.txt"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which even root can make nothing")
def test_out_that_cannot_be_made_is_refused_before_any_work(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=r"--out /proc/run cannot be written: /proc: .*; choose another --out"):
        tune(changed(tiny_settings, out="/proc/run"))


def test_a_finished_run_is_not_run_again(tiny_settings: FinetuneSettings) -> None:
    result = tune(tiny_settings)
    with pytest.raises(UsageError, match="pass --resume to continue it"):
        tune(tiny_settings)
    assert tune(tiny_settings, resume=True, observer=lambda _: pytest.fail("it ran again")) == result


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": 5}, "--seed was 0, is now 5; give the old value,"),
        ({"learning_rate": 2e-3}, "--lr was 0.001, is now 0.002"),
        ({"seed": 5, "ema_decay": 0.5}, "ema_decay was 0.97, is now 0.5; --seed was 0, is now 5; give the old values,"),
        ({"kernel": "cubic"}, "--kernel was 'gaussian', is now 'cubic'"),
        ({"steps": 3}, "--steps was 2, is now 3"),
        ({"batch_size": 9}, "--batch-size was 8, is now 9"),
        ({"reference": "batch"}, "--reference was 'bank', is now 'batch'"),
        ({"iterations": 9}, "--iterations was 6, is now 9"),
        ({"features": ("pixels",)}, r"--features was \['digits-conv', 'pixels'\], is now \['pixels'\]"),
        ({"model": "digits"}, "MODEL was 'tiny', is now 'digits'"),
    ],
)
def test_resume_with_other_settings_is_refused(
    values: dict[str, Any], said: str, tiny_settings: FinetuneSettings
) -> None:
    tune(tiny_settings)
    with pytest.raises(UsageError, match=said):
        tune(changed(tiny_settings, **values), resume=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "nowhere.npz"}, "does not exist"),
        ({"kernel": "rbf"}, "known: cubic, energy, gaussian, laplace"),
        ({"reference": "nystrom", "landmarks": 1438}, "--landmarks 1438: there are only 1437 real images"),
        ({"features": ("vgg",)}, "encoder 'vgg' is unknown"),
        ({"holdout": "vgg"}, "encoder 'vgg' is unknown"),
        ({"sampler": "magic"}, "magic"),
        ({"steps": 1001}, "1 to 1000"),
        ({"steps": None}, "tiny: --steps is missing"),
        ({"batch_size": 2000}, "1437 images for a batch of 2000"),
    ],
)
def test_bad_input_leaves_nothing(values: dict[str, Any], said: str, tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match=said):
        tune(changed(tiny_settings, **values))
    assert not tiny_settings.out.exists()


def test_a_run_refused_in_its_folder_does_not_block_the_next(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are chosen, and the untuned sampler is measured, when the folder is made."""
    with pytest.raises(UsageError, match="--lora-targets foo: no layer's name ends so"):
        tune(changed(tiny_settings, tune="lora", lora_targets="foo"))
    assert not tiny_settings.out.exists()
    monkeypatch.setattr(Task, "judge", lambda *_: {"digits-mlp": {"frechet": Measured(float("nan"))}})
    with pytest.raises(NotFiniteError, match="choose another --holdout"):
        tune(tiny_settings)
    assert not tiny_settings.out.exists()


def test_class_conditional_models_are_refused(
    tiny_settings: FinetuneSettings, tiny_model: Path, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    config = json.loads((tiny_model / "unet/config.json").read_text())
    UNet2DModel.from_config(config | {"num_class_embeds": 10}).save_pretrained(tmp_path / "labels/unet")
    DDIMScheduler().save_pretrained(tmp_path / "labels/scheduler")
    with pytest.raises(UsageError, match="conditional on 10 classes; only unconditional ones"):
        tune(changed(tiny_settings, model=str(tmp_path / "labels")))


def poison_at(iteration: int, monkeypatch: pytest.MonkeyPatch, poison: Callable[[Tensor], Tensor]) -> None:
    """Let the loss of one iteration go wrong."""
    real, calls = objective.encoder_losses, iter(range(1000))

    def losses(*arguments: Any) -> dict[str, Tensor]:
        values = real(*arguments)
        return {name: poison(value) for name, value in values.items()} if next(calls) == iteration else values

    monkeypatch.setattr(objective, "encoder_losses", losses)


@pytest.mark.parametrize(
    ("what", "poison"),
    [
        ("loss is nan", lambda value: value * float("nan")),
        ("loss is inf", lambda value: value + float("inf")),
        ("gradient is nan", lambda value: value + 0.0 * torch.sqrt(0.0 * value)),
    ],
)
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    what: str, poison: Callable[[Tensor], Tensor], tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_at(5, monkeypatch, poison)
    with pytest.raises(MmdExportError, match=rf"iteration 5: the {what} \(encoder digits-conv, pixels\)") as caught:
        tune(tiny_settings)
    assert "--resume --finish" in str(caught.value)
    state = load_file(tiny_settings.out / "state.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert saved_iteration(tiny_settings) == 5  # between the evaluations at 4 and 6
    assert (tiny_settings.out / "curve.png").is_file()
    assert not (tiny_settings.out / "unet").exists()
    with pytest.raises(UsageError):
        load_checkpoint(tiny_settings.out)
    monkeypatch.undo()
    ended = tune(tiny_settings, resume=True, finish=True, observer=lambda _: pytest.fail("it was tuned on"))
    assert (ended.iterations, ended.best_iteration) == (5, best_logged(tiny_settings))
    assert same_tensors(weights_of(ended.folder), state)


def best_logged(settings: FinetuneSettings) -> int:
    evaluations = [line for line in log_of(settings.out) if "held_out" in line]
    return int(min(evaluations, key=lambda line: line["held_out"])["iteration"])


def same_tensors(shipped: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    best = {name: tensor for name, tensor in state.items() if name.startswith("best/")}
    return len(best) == len(shipped) and all(
        any(name.endswith(f".{key}") and torch.equal(tensor, found) for name, found in best.items())
        for key, tensor in shipped.items()
    )


def test_weights_that_are_not_finite_are_not_saved(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_at(5, monkeypatch, lambda value: value * float("nan"))

    def break_weights(report: Report) -> None:
        if report.iteration == 5:
            next(iter(states[0].parameters.values())).data.fill_(float("nan"))

    states: list[TuningState] = []
    share = TuningState.share

    def remember(self: TuningState, world: World) -> None:
        states.append(self)
        share(self, world)

    monkeypatch.setattr(TuningState, "share", remember)
    with pytest.raises(MmdExportError, match="iteration 5"):
        tune(tiny_settings, observer=break_weights)
    assert saved_iteration(tiny_settings) == 4


def test_finish_needs_a_run_that_was_stopped(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match="give --resume with it"):
        tune(tiny_settings, finish=True)
    with pytest.raises(UsageError, match="run does not exist; --finish needs the folder of a run"):
        tune(tiny_settings, resume=True, finish=True)
    tiny_settings.out.mkdir()
    with pytest.raises(UsageError, match="holds no saved state that --finish could end with"):
        tune(tiny_settings, resume=True, finish=True)


def test_other_settings_are_refused_before_any_work(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_settings.out.mkdir()
    write_json(tiny_settings.out / "settings.json", {"settings": tiny_settings.public(), "data_sha256": "known later"})
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="--seed was 0, is now 5"):
        tune(changed(tiny_settings, seed=5), resume=True)


@pytest.mark.skipif(os.name == "nt", reason="no flock on Windows")
def test_two_live_processes_do_not_share_a_folder(tiny_settings: FinetuneSettings) -> None:
    tiny_settings.out.mkdir()
    with closing(RunFolder(tiny_settings.out)) as other:
        other.require_usable(tiny_settings, resume=True)
        with pytest.raises(UsageError, match="run is being tuned by another process; let it end"):
            tune(tiny_settings, resume=True)
    with closing(RunFolder(tiny_settings.out)) as later:
        later.require_usable(tiny_settings, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="no flock on Windows")
def test_a_killed_process_holds_no_folder(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    script = f"import fcntl, os, signal; fcntl.flock(os.open({str(tmp_path)!r}, os.O_RDONLY), fcntl.LOCK_EX); "
    subprocess.run([sys.executable, "-c", script + "os.kill(os.getpid(), signal.SIGKILL)"], check=False)
    with closing(RunFolder(tmp_path)) as folder:
        folder.begin({"settings": {}}, tiny_settings)


def test_a_run_folder_is_not_tuned_on_for_another_plan(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    run = tune(changed(tiny_settings, iterations=1)).folder
    with pytest.raises(UsageError, match=r"run: tuned for .*2 steps.*, asked for .*3 steps"):
        tune(changed(tiny_settings, model=str(run), steps=3, out=tmp_path / "more"))
    assert not (tmp_path / "more").exists()
    again = tune(changed(tiny_settings, model=str(run), steps=None, iterations=1, out=tmp_path / "same"))
    assert again.held_out_before == tune(changed(tiny_settings, iterations=1), resume=True).held_out_after


class Steep(nn.Module):
    """Finite features whose gradient is not: the derivative of 0 sqrt(0 x) is 0 times infinity."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return flat + 0.0 * torch.sqrt(0.0 * flat)


def test_the_encoder_whose_gradient_is_not_finite_is_named(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Encoder:
        return Encoder("pixels", Steep()) if name == "pixels" else load_encoder(name)

    monkeypatch.setattr(features, "load_encoder", load)
    monkeypatch.setattr(features, "require_fit", lambda *_, **__: None)  # it would find this one before the first step
    with pytest.raises(MmdExportError, match=r"iteration 0: the gradient is nan \(encoder pixels\); the last good"):
        tune(tiny_settings)
    assert (tiny_settings.out / "state.safetensors").is_file()


def fail_at_call(number: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``number``-th gradient ends with ``error``."""
    calls, add_gradient = [], objective.add_gradient

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return add_gradient(*arguments, **options)

    monkeypatch.setattr(loop, "add_gradient", failing)


def test_memory_that_runs_out_loses_nothing_and_the_run_goes_on_with_less_at_once(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration after the last evaluation; smaller micro-batches round otherwise, and nothing else differs."""
    whole = weights_of(tune(changed(tiny_settings, out=tiny_settings.out.with_name("whole"))).folder)
    with monkeypatch.context() as patch:
        fail_at_call(4, RuntimeError("CUDA out of memory. Tried to allocate"), patch)
        with pytest.raises(NotAvailableError, match=r"out of memory: CUDA .*; the state is saved: pass --resume with a "
                           r"--micro-batch-size below 8, or free memory"):  # fmt: skip
            tune(tiny_settings)
    assert saved_iteration(tiny_settings) == 3
    found = weights_of(tune(changed(tiny_settings, micro_batch_size=4), resume=True).folder)
    assert all(torch.allclose(found[name], each, rtol=0, atol=1e-5) for name, each in whole.items())


def test_encoders_take_no_more_at_once_than_eight_micro_batches(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real images, loss weights, evaluations and the result: a smaller micro-batch cures memory that ran out there."""
    sizes: list[int] = []

    def load(name: str) -> Encoder:
        encoder = load_encoder(name)
        encoder.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return encoder

    monkeypatch.setattr(features, "load_encoder", load)
    tune(changed(tiny_settings, micro_batch_size=4, iterations=1, feature_cache=False, balance="untuned"))
    assert max(sizes) == 32
    assert (tiny_settings.encoded_at_once, changed(tiny_settings, micro_batch_size=600).encoded_at_once) == (512, 512)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("a defect")])
def test_an_error_before_the_first_state_leaves_no_folder(
    error: Exception, tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(Task, "judge", failing)
    with pytest.raises(type(error), match=str(error)):
        tune(tiny_settings)
    assert not tiny_settings.out.exists()


def test_any_other_error_saves_first_and_goes_on_as_it_is(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_call(4, ValueError("a defect"), monkeypatch)
    with pytest.raises(ValueError, match="a defect"):
        tune(tiny_settings)
    assert saved_iteration(tiny_settings) == 3


def test_a_step_that_breaks_off_is_not_saved(tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be of two iterations then; the state of the last evaluation stays."""
    update, calls = TuningState.update_average, []

    def failing(state: TuningState, decay: float) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("CUDA out of memory")
        update(state, decay)

    monkeypatch.setattr(TuningState, "update_average", failing)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        tune(tiny_settings)
    assert saved_iteration(tiny_settings) == 2


def test_a_disk_that_is_full_at_the_first_save_leaves_no_folder(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TuningState, "save", full)
    with pytest.raises(MmdExportError, match="No space left on device; nothing was saved yet; free the cause and run"):
        tune(tiny_settings)
    assert not tiny_settings.out.exists()
