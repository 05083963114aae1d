"""Several processes: two of gloo under torchrun give the gradient, the samples and the run of one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmd_export.commands.evaluate import Scoring, _Run, evaluate
from mmd_export.commands.sample import SampleOptions
from mmd_export.errors import MmdExportError, UsageError
from mmd_finetune.loop import tune
from mmd_finetune.objective import add_gradient
from mmd_finetune.run_folder import differences
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.state import TuningState
from mmd_finetune.task import REPORT_SEED, prepare
from mmd_finetune.world import World, open_world
from tests.finetune.processes import Child
from tests.finetune.runs import WEIGHTS, changed, log_of

ROOT = Path(__file__).parents[2]
# A whole run in a process group that accelerate has made.
UNDER_ACCELERATE = """
import sys
from accelerate import PartialState
from mmd_finetune.loop import tune
from mmd_finetune.settings import FinetuneSettings
state = PartialState(cpu=True)
assert state.num_processes == 2
tune(FinetuneSettings.model_validate_json(sys.argv[1]))
"""


def one_of_two(_: object, settings: FinetuneSettings, folder: Path) -> None:
    """Write its gradient, the samples that all receive, and how an error of one reaches both."""
    with open_world("cpu") as world:
        if not world.is_first:
            settings = settings.model_copy(update={"data": "only/the/first/one/has.npz"})
        task = prepare(settings, world)
        state = TuningState(task.trainable(), 1e-3)
        if not world.is_first:
            torch.nn.init.zeros_(next(state.denoiser.parameters()))
        state.share(world)
        losses = add_gradient(task, task.tuning_sampler(state.denoiser), task.noise_of(2), 2)
        world.sum_gradients(state.parameters.values())
        said = []
        for action in (world.first_does, world.together):

            def fail(refusing: int = 0 if action == world.first_does else 1) -> None:
                if world.rank == refusing:
                    raise UsageError(f"refused by {world.rank}")

            try:
                action(fail)
            except UsageError as error:
                said.append(str(error))
        torch.save({
            "losses": losses, "gradient": {name: each.grad for name, each in state.parameters.items()},
            "samples": task.samples(task.trainable(), REPORT_SEED, 7), "said": said,
            "any": [world.any(world.rank == 1), world.any(False)], "noise": len(task.noise_of(0)["noise"]),
        }, folder / f"rank-{world.rank}.pt")  # fmt: skip


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """``work`` in two processes that are told of each other by the variables of torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [Child(work, *arguments, given={**told, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    wait([rank.process.sentinel for rank in ranks], timeout=120)  # if one fails, the other would wait for it
    assert [rank.end(20) for rank in ranks] == [0, 0]


def start(processes: int, *command: str) -> subprocess.Popen[str]:
    """``command`` under torchrun, one thread each."""
    folders = os.pathsep.join(str(ROOT / name) for name in (".", "finetune", "runtimes/python"))
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.timeout(180)
def test_two_processes_give_the_gradient_and_the_samples_of_one(
    tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    settings = changed(tiny_settings, batch_size=9, micro_batch_size=3, eta=1.0, learn="plan")  # shares of 4 and 5
    in_two_processes(one_of_two, settings, tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    task = prepare(changed(settings, micro_batch_size=None))
    state = TuningState(task.trainable(), 1e-3)
    losses = add_gradient(task, task.tuning_sampler(state.denoiser), task.noise_of(2), 2)
    floor = 1e-3 * float(torch.stack([p.grad.norm() for p in state.parameters.values() if p.grad is not None]).norm())
    for rank in ranks:
        for name, parameter in state.parameters.items():
            assert parameter.grad is not None
            error = float((rank["gradient"][name] - parameter.grad).norm())
            assert error < 1e-5 * max(float(parameter.grad.norm()), floor), name
        for name, loss in losses.items():
            assert float(rank["losses"][name]) == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
        torch.testing.assert_close(rank["samples"], task.samples(task.trainable(), REPORT_SEED, 7))
        assert rank["said"] == ["refused by 0", "refused by 1"]
        assert rank["any"] == [True, False]
    assert all(torch.equal(ranks[0]["gradient"][name], ranks[1]["gradient"][name]) for name in state.parameters)
    assert [rank["noise"] for rank in ranks] == [4, 5]


def close_weights(run: Path, other: Path) -> bool:
    a, b = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    return all(float((a[name] - b[name]).abs().max()) < 1e-4 for name in a)


@pytest.mark.timeout(180)
def test_a_run_under_accelerate_is_the_run_of_one(tiny_settings: FinetuneSettings, tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(UNDER_ACCELERATE)
    process = start(2, str(script), tiny_settings.model_dump_json())
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr[-3000:]
    alone = tune(changed(tiny_settings, out=tmp_path / "alone")).folder
    assert close_weights(tiny_settings.out, alone)
    together, single = log_of(tiny_settings.out), log_of(alone)
    assert [line["iteration"] for line in together] == list(range(7))  # one process wrote
    for ours, theirs in zip(together, single, strict=True):
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-3, abs=1e-5)


@pytest.mark.timeout(240)
def test_the_command_under_torchrun_saves_on_sigterm_and_goes_on_alone(
    tiny_settings: FinetuneSettings, tiny_model: Path
) -> None:
    run = tiny_settings.out
    options = f"--steps 2 --out {run} --batch-size 8 --iterations 4000 --lr 0.001 --device cpu"
    process = start(2, "-m", "mmd_export.cli", "finetune", str(tiny_model), *options.split())
    try:
        while not (run / "log.jsonl").is_file() or len((run / "log.jsonl").read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "held-out Frechet distance" not in stdout
    assert not (run / "unet").exists()
    lines = log_of(run)
    assert lines[-1]["iteration"] % 20 != 0 or len(lines) == 1 + lines[-1]["iteration"]
    done: list[int] = []

    def stop(report: Any) -> None:
        done.append(report.iteration)
        raise KeyboardInterrupt

    settings = FinetuneSettings(
        model=str(tiny_model), steps=2, out=run, batch_size=8, iterations=4000, learning_rate=1e-3, device="cpu"
    )
    with pytest.raises(KeyboardInterrupt):
        tune(settings, resume=True, observer=stop)
    assert done == [lines[-1]["iteration"] + 1], stderr[-2000:]  # the signal saved the very last iteration


@pytest.mark.timeout(180)
def test_evaluate_under_torchrun_scores_the_samples_of_one_process(tmp_path: Path) -> None:
    options = ("--count", "31", "--seed", "5", "--features", "digits-mlp", "--bootstrap", "0", "--device", "cpu")
    file = tmp_path / "found.json"
    process = start(2, "-m", "mmd_export.cli", "evaluate", "digits", "--steps", "2", *options, "--json", str(file))
    stdout, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr[-3000:]
    assert stdout.count("31 samples of seed 5") == 1
    alone = evaluate(SampleOptions("digits", 5, 31, steps=2), Scoring(encoders=("digits-mlp",), resamples=0))
    found = json.loads(file.read_text())
    assert found["class_shares"] == alone["class_shares"]
    assert found["metrics"]["digits-mlp"]["frechet"]["value"] == pytest.approx(
        alone["metrics"]["digits-mlp"]["frechet"]["value"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("device", "count", "said"),
    [
        ("tpu", 9, "--device is 'tpu'; give auto, cpu, cuda or cuda:NUMBER"),
        ("cuda", 9, "device cuda: no NVIDIA GPU is visible to torch"),
        ("cpu", 1, "2 processes for 1 samples; start fewer or raise --count"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_of_two_processes_refuses_before_it_draws(device: str, count: int, said: str) -> None:
    options = SampleOptions("digits", count=count, steps=2, device=device)
    with pytest.raises(MmdExportError, match=re.escape(said)):
        _Run(options, Scoring(), World(1, 2), lambda *_: None).prepare()


def test_processes_that_draw_from_different_models_are_refused() -> None:
    run = _Run(SampleOptions("digits"), Scoring(), World(1, 2), lambda *_: None)
    run.require_same("a", "a")
    with pytest.raises(UsageError, match="digits has SHA-256 a in process 1, b in process 0; give both the same"):
        run.require_same("a", "b")


def test_alone_every_method_is_trivial() -> None:
    world, rows = World(), torch.ones(3, 2)
    assert world.share(7) == range(7)
    gathered, first = world.gather(rows)
    assert gathered is rows
    assert first == 0
    assert world.is_first
    assert world.first_does(lambda: 5) == world.together(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        world.together(lambda: 1 // 0)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 3), (2, 5), (0, 2), (4096, 7)])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_images_are_refused(tiny_settings: FinetuneSettings) -> None:
    with pytest.raises(UsageError, match="9 processes for a batch of 8; start fewer or raise --batch-size"):
        prepare(tiny_settings, World(0, 9))


def test_several_processes_that_cannot_meet_are_refused(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        UsageError, match=r"WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set; start .* torchrun"
    ):
        tune(tiny_settings)
    assert not tiny_settings.out.exists()


def test_one_process_under_torchrun_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with open_world("cpu") as world:
        assert world == World()
    assert not torch.distributed.is_initialized()


def test_what_differs_between_two_processes_is_named_settings_first() -> None:
    first = {"settings": {"steps": 5, "seed": 0}, "data_sha256": "a"}
    assert differences(first, {"settings": {"steps": 5, "seed": 0}, "data_sha256": "a"}) == []
    other = {"settings": {"steps": 5, "seed": 1}, "data_sha256": "b", "quantisation_sha256": "c"}
    assert differences(other, first) == [("seed", 1, 0), ("data_sha256", "b", "a"), ("quantisation_sha256", "c", None)]
