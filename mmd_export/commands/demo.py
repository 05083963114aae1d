"""``mmd-export demo``: finetune -> build -> verify -> bench -> sample on the built-in digits, into one folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.bench import BenchReport, bench
from mmd_export.commands.candidates import BenchOptions
from mmd_export.commands.cards import write_latency
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.commands.verify import verify
from mmd_export.errors import UsageError
from mmd_export.folders import output_file, write_text
from mmd_export.parity import ParityReport
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder
from mmd_finetune.loop import Observer, tune
from mmd_finetune.metrics import frechet_distance
from mmd_finetune.settings import make_settings

STEPS = 5
COUNT = 1797  # as many samples as there are scans
BENCH_SECONDS = 15.0
SHOWN = 36  # images of each kind in the picture
SEED = 2023
HELD_OUT = "digits-mlp"
RESULTS = "results.json"


@dataclass(frozen=True)
class DemoResult:
    """Rows for the two tables and the closing lines."""

    quality_rows: tuple[tuple[str, str], ...]
    latency_rows: tuple[tuple[str, str, str], ...]
    summary: str


def run_demo(
    out: Path,
    *,
    overwrite: bool,
    iterations: int | None,
    notify: Callable[[str], None],
    bar: Callable[[], AbstractContextManager[Observer]],
) -> DemoResult:
    """The whole job; a demo that was stopped goes on where it was. Raises UsageError for a folder that is taken."""
    _make_room(out, overwrite)
    start = time.perf_counter()
    run, folder = out / "run", out / "bundle"
    notify(f"1/5 tuning the built-in digits model for {STEPS} steps")
    settings = make_settings({"model": "digits", "steps": STEPS, "out": run, "iterations": iterations})
    with bar() as observer:
        tuned = tune(settings, resume=run.exists(), observer=observer)
    notify("2/5 building one ONNX graph from the tuned model")
    bundle = build(BuildOptions(str(run), "onnx", folder, overwrite=folder.exists()))
    notify("3/5 verifying it, stage by stage")
    parity = verify(bundle, checkpoint=str(run))
    parity.require()
    notify("4/5 measuring latency against torch and a per-step session")
    latency = bench(BenchOptions((folder,), checkpoint=str(run), seconds=BENCH_SECONDS))
    write_latency(folder, latency.to_dict())
    notify(f"5/5 sampling {COUNT} images of each kind")
    kinds = draw_kinds(folder)
    distances = {name: distance_to_real(images) for name, images in kinds.items() if len(images) == COUNT}
    draw_picture(kinds, distances, out / "digits.png")
    seconds = time.perf_counter() - start
    results = _results(bundle, tuned.seconds, parity, latency, distances, seconds)
    write_text(out / RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
    return _shown(out, bundle, parity, latency, distances, seconds)


def _make_room(out: Path, overwrite: bool) -> None:
    """A new folder, or the one of a demo: finished ones are replaced by ``--overwrite`` only."""
    if not out.exists() or not any(out.iterdir() if out.is_dir() else (out,)):
        return
    ours = out.is_dir() and {path.name for path in out.iterdir()} <= {"run", "bundle", "digits.png", RESULTS}
    if not ours or ((out / RESULTS).exists() and not overwrite):
        raise UsageError(f"{out} already exists; choose another --out" + (" or pass --overwrite" if ours else ""))
    if (out / RESULTS).exists():
        shutil.rmtree(out)


def draw_kinds(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """Images (N, 1, 8, 8) by kind. The tuned ones come out of the artefact, not out of torch."""
    digits = "digits"
    return {
        "real scans": load_digits_split().all_images,
        "100 steps, untuned": sample(SampleOptions(digits, SEED, SHOWN, steps=100)),
        "10 steps, untuned": sample(SampleOptions(digits, SEED, COUNT, steps=10)),
        f"{STEPS} steps, untuned": sample(SampleOptions(digits, SEED, COUNT, steps=STEPS)),
        f"{STEPS} steps, tuned, from the ONNX graph": sample(SampleOptions(str(bundle), SEED, COUNT)),
    }


def distance_to_real(images: NDArray[np.float32]) -> float:
    """Frechet distance to all 1,797 scans in the encoder that the loss never saw."""
    encoder, real = load_encoder(HELD_OUT), load_digits_split().all_images
    with torch.inference_mode():
        return frechet_distance(encoder(torch.from_numpy(images)), encoder(torch.from_numpy(real)))


def draw_picture(kinds: dict[str, NDArray[np.float32]], distances: dict[str, float], path: Path) -> None:
    """One labelled panel a kind; the same noise in each, so that images at the same place belong together."""
    from matplotlib.figure import Figure

    from mmd_export.pictures import grid

    shown = [name for name in kinds if name != "10 steps, untuned"]
    figure = Figure(figsize=(11, 1.75 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), 1), shown, strict=True):
        pick = np.linspace(0, len(kinds[name]) - 1, SHOWN).astype(int) if name == "real scans" else np.arange(SHOWN)
        apart = np.pad(kinds[name][pick], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)
        axes.imshow(grid(apart, columns=SHOWN // 2), cmap="gray", interpolation="nearest")
        scored = name in distances and name != "real scans"
        score = f"   (Frechet distance to the scans, held-out encoder: {distances[name]:.1f})" if scored else ""
        axes.set_title(name + score, loc="left", fontsize=11)
        axes.set_axis_off()
    with output_file(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _results(
    bundle: Bundle,
    tuning_seconds: float,
    parity: ParityReport,
    latency: BenchReport,
    distances: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "tuning_seconds": round(tuning_seconds, 1),
        "held_out_frechet_distance": {name: value for name, value in distances.items() if name != "real scans"},
        "parity": parity.to_dict(),
        "latency": latency.to_dict(),
        "artefact_bytes": bundle.artefact_bytes,
        "graph": bundle.manifest.graph.model_dump(mode="json"),
    }


def _shown(
    out: Path,
    bundle: Bundle,
    parity: ParityReport,
    latency: BenchReport,
    distances: dict[str, float],
    seconds: float,
) -> DemoResult:
    first, report = latency.candidates[0], latency.latency
    rows = []
    for name in report.seconds:
        ratio = "1" if name == first else f"{report.ratio(name, first).median:.2f}"
        rows.append(("one graph" if name == first else name, f"{report.summary(name).median * 1e3:.2f}", ratio))
    worst = parity.rungs[-1].worst
    megabytes = bundle.artefact_bytes / 1e6
    summary = (
        f"parity: rungs 1 to 6 passed, the graph is within {worst:.0e} of the float64 reference at every step\n"
        f"{out / 'bundle'}: one ONNX file of {megabytes:.2f} MB, noise -> image\n"
        f"{out / 'digits.png'}: the picture\n{out / RESULTS}: all numbers\n{seconds:.0f} s in all"
    )
    quality = tuple((name, f"{value:.2f}") for name, value in distances.items() if name != "real scans")
    return DemoResult(quality, tuple(rows), summary)
