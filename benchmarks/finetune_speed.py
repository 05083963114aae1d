"""Speed and memory of tuning against a plain loop that does what the paper's released code does.

Writes ``benchmarks/results/finetune_speed.json`` (``finetune_speed_cuda.json`` on a GPU). Both sides tune one model
with the same encoder, kernel, batch and steps. Speed: iterations of both in turn, in one process; the ratio is the
median over the rounds with its bootstrap interval. Memory: each setting in a process of its own, the peak resident set
(on a GPU the peak of torch's allocator) of one iteration; ``added`` is what lies above the loaded model. What is
measured is kept in ``--work`` after every round, and a run that was stopped goes on there. About 15 minutes on 2 cores.
The weights of the models are random but for digits, and so is the encoder where none is shipped for the size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import CIFAR10_UNET, RESULTS, ROOT, environment, save_cifar10, save_small, write_result
from benchmarks.finetune_plain import PlainLoop
from mmd_export.errors import NotAvailableError
from mmd_export.folders import output_place
from mmd_export.latency import LatencyReport
from mmd_finetune.compute import full_float32
from mmd_finetune.data import load_images
from mmd_finetune.features import Encoder
from mmd_finetune.loop import iterate
from mmd_finetune.noise_ahead import NoiseAhead
from mmd_finetune.objective import require_same_gradient
from mmd_finetune.reference import encode_in_batches, make_reference
from mmd_finetune.settings import make_settings
from mmd_finetune.state import TuningState
from mmd_finetune.task import Task, prepare

STEPS, SMALL, LARGE = 5, 256, 4096
REAL_IMAGES = 5000
LEAST_SPEED = {"cpu": 1.3, "cuda": 3.0}
MOST_MEMORY = 1.5
MODELS = {"cpu": ("digits", "small"), "cuda": ("cifar10",)}
# What is fastest on the device; the network's arithmetic is float32 on the CPU, as the plain loop's is.
OURS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"autocast": "bf16", "channels_last": True, "compile": True},
}


def make_model(name: str, folder: Path) -> str:
    """What ``--model`` takes."""
    if name == "digits":
        return name
    place = folder / name
    if not place.exists():
        (save_small if name == "small" else save_cifar10)(place)
    return str(place)


def make_data(name: str, folder: Path) -> str:
    """As many images of the model's size as the large batch needs: the scans over and over, or random ones."""
    path = folder / f"{name}-data.npy"
    if not path.exists() and name == "digits":
        scans = load_images("digits")
        np.save(path, scans[np.arange(REAL_IMAGES) % len(scans)])
    elif not path.exists():
        size = 16 if name == "small" else CIFAR10_UNET["sample_size"]
        np.save(path, np.random.default_rng(0).integers(0, 256, (REAL_IMAGES, 3, size, size), dtype=np.uint8))
    return str(path)


def feature_network() -> nn.Module:
    """A random convolutional network, colour images to 512 features, about as heavy as a call of the small model."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.GroupNorm(16, outer), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().requires_grad_(False)


def make_task(name: str, folder: Path, device: str, **values: Any) -> Task:
    """The task of ``mmd_finetune`` with one encoder and the cubic kernel, as the plain loop has."""
    given = {
        "model": make_model(name, folder), "data": make_data(name, folder), "steps": STEPS, "out": folder / "unused",
        "kernel": "cubic", "features": ("digits-conv",), "device": device, "learning_rate": 5e-6,
        "rate_decay": "constant", **values,
    }  # fmt: skip
    settings = make_settings(given)
    if name == "digits":
        return prepare(settings)
    anything = {"features": ("pixels",), "holdout": ()}  # nothing is evaluated, and the encoder is made below
    task = prepare(settings.model_copy(update=anything))
    real = torch.from_numpy(load_images(settings.data)).to(task.device)
    encoder = Encoder("random-conv", feature_network().to(task.device))
    return replace(
        task,
        references=(make_reference(encoder, "cubic", encode_in_batches(encoder, real)),),
        loss_weights={encoder.name: 1.0},
    )


def our_step(task: Task) -> Callable[[], float]:
    """One iteration of ``mmd-export finetune``, with everything that belongs to it; gives its loss."""
    state, done = TuningState(task.base.denoiser, task.settings.learning_rate), iter(range(10**9))
    sampler, noise_of = task.tuning_sampler(state.denoiser), NoiseAhead(task.noise_of, 10**9)
    if task.settings.compile:
        with full_float32():
            require_same_gradient(task, state.denoiser, sampler)

    @full_float32()
    def step() -> float:
        iteration = next(done)
        losses, _ = iterate(task, state, sampler, iteration, noise_of(iteration))
        return sum(losses.values())

    return step


def plain_step(task: Task) -> Callable[[], float]:
    """One iteration of the plain loop on the same model, images and encoder; gives its loss."""
    from diffusers import DDIMScheduler

    (reference,) = task.references
    config = json.loads(task.base.configs["scheduler/scheduler_config.json"])
    real = torch.from_numpy(load_images(task.settings.data)).to(task.device)
    unet = task.base.denoiser.get_submodule("unet")
    loop = PlainLoop(
        unet, DDIMScheduler.from_config(config), reference.encoder.network, real, task.settings.batch_size, STEPS
    )
    return full_float32()(loop.step)


SIDES = {"plain": plain_step, "ours": our_step}


def ours(name: str, folder: Path, device: str) -> dict[str, Any]:
    """The settings of our side: without torch.compile where it gives another gradient, which is tried once."""
    given = OURS[device]
    if not given.get("compile"):
        return given
    refused = kept(folder)["refused"]
    if name not in refused:
        task = make_task(name, folder, device, batch_size=SMALL, **given)
        try:
            our_step(task)
            refused[name] = ""
        except NotAvailableError as error:
            refused[name] = str(error)
        keep(folder, {"refused": refused})
    return {**given, "compile": not refused[name]}


def measure_speed(name: str, folder: Path, device: str, rounds: int, seconds: dict[str, list[float]]) -> None:
    """Fill up ``seconds`` to ``rounds`` of each side, in turn, after two that do not count."""
    steps = {
        "plain": plain_step(make_task(name, folder, device, batch_size=SMALL)),
        "ours": our_step(make_task(name, folder, device, batch_size=SMALL, **ours(name, folder, device))),
    }
    for step in steps.values():
        for _ in range(2):
            step()
    while len(seconds["ours"]) < rounds:
        order = ("plain", "ours") if len(seconds["ours"]) % 2 else ("ours", "plain")
        taken = {side: timed(steps[side], device) for side in order}
        for side, value in taken.items():
            seconds[side].append(value)
        print(name, len(seconds["ours"]), {side: round(value, 3) for side, value in taken.items()}, flush=True)
        keep(folder, {"speed": {name: seconds}})


def timed(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


MEMORY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain 256": ("plain", {"batch_size": SMALL}),
    "ours 256": ("ours", {"batch_size": SMALL}),
    "ours 256, recomputed calls": ("ours", {"batch_size": SMALL, "checkpoint_calls": True}),
    "ours 4096 in micro-batches": ("ours", {"batch_size": LARGE, "micro_batch_size": SMALL}),
}


def measure_memory(name: str, folder: Path, device: str, case: str) -> dict[str, float]:
    """Peak and added memory of one iteration, MB; run in a fresh process."""
    side, values = MEMORY_CASES[case]
    given = values if side == "plain" else ours(name, folder, device) | values
    step = SIDES[side](make_task(name, folder, device, **given))
    before = resident("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # start the peak anew; man 5 proc
    else:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    seconds = round(time.perf_counter() - start, 2)
    return {"peak_mb": round(peak / 1e6, 1), "added_mb": round((peak - before) / 1e6, 1), "seconds": seconds}


def resident(field: str) -> int:
    """Bytes from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if field in line)
    return int(line.split()[1]) * 1024


def in_a_process(arguments: argparse.Namespace, name: str, case: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.finetune_speed", "--device", arguments.device, "--work"]
    done = subprocess.run(
        [*command, str(arguments.work), "--child", name, case], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, case, found, flush=True)
    return found


def kept(folder: Path) -> dict[str, Any]:
    path = folder / "measured.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"speed": {}, "memory": {}, "refused": {}, **known}


def keep(folder: Path, values: dict[str, dict[str, Any]]) -> None:
    known = kept(folder)
    for key, part in values.items():
        known[key] |= part
    with output_place(folder / "measured.json") as place:
        place.write_text(json.dumps(known, indent=1), encoding="utf-8")


def summarise(measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Ratios with their intervals, and whether each target is reached."""
    models: dict[str, Any] = {}
    for name, seconds in measured["speed"].items():
        report = LatencyReport({side: tuple(values) for side, values in seconds.items()}, {}, {})
        ratio, memory = report.ratio("plain", "ours"), measured["memory"][name]
        images = {side: round(SMALL / report.summary(side).median, 2) for side in seconds}
        growth = {
            key: round(memory["ours 4096 in micro-batches"][key] / memory["ours 256"][key], 3)
            for key in ("peak_mb", "added_mb")
        }
        models[name] = {
            "images_per_second": images,
            "times_faster": vars(ratio),
            "memory": memory,
            "not_compiled": measured["refused"].get(name, ""),
            "memory_4096_to_256": growth,
            "reached": {
                "speed": ratio.median >= LEAST_SPEED[device],
                "memory": max(growth.values()) <= MOST_MEMORY,
            },
        }
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--models", nargs="+", help="default: those of the device")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mmd-finetune-speed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        print(json.dumps(measure_memory(arguments.child[0], arguments.work, arguments.device, arguments.child[1])))
        return
    for name in arguments.models or MODELS[arguments.device]:
        memory = kept(arguments.work)["memory"].get(name, {})
        for case in MEMORY_CASES:
            if case not in memory:
                memory[case] = in_a_process(arguments, name, case)
                keep(arguments.work, {"memory": {name: memory}})
        seconds = kept(arguments.work)["speed"].get(name, {side: [] for side in SIDES})
        if len(seconds["ours"]) < arguments.rounds:
            measure_speed(name, arguments.work, arguments.device, arguments.rounds, seconds)
    measured = kept(arguments.work)
    models = summarise(measured, arguments.device)
    out = arguments.out or RESULTS / f"finetune_speed{'' if arguments.device == 'cpu' else '_cuda'}.json"
    write_result(
        out, "benchmarks/finetune_speed.py",
        {"steps": STEPS, "batch": SMALL, "large_batch": LARGE, "ours": OURS[arguments.device], "models": models,
         "seconds": measured["speed"], "load_at_the_end": environment().get("load")},
    )  # fmt: skip
    for name, values in models.items():
        print(name, values["times_faster"]["median"], values["memory_4096_to_256"], values["reached"])


if __name__ == "__main__":
    main()
