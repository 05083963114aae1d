"""Every precision of target onnx on the tuned digits -> benchmarks/results/precision.json.

For each: size, pixel error after every step, free-running and teacher-forced, against the float64 reference, and the
Frechet distance to all scans in the encoder that no choice but those of this file looked at. Then that distance and
those errors for the precisions of other targets (``elsewhere``, ``steps_elsewhere``), what was tried before the
defaults were set (``trials``), what the float32 islands of 16 bits are worth (``islands``), how far ranges grow with
the images scanned (``ranges``), and the sizes on the ddpm-cifar10 architecture (``sizes``).

bf16 is emulated: float32 arithmetic with every result rounded, see ``mmd_export/precision/emulate.py``. ``--model`` is
a run folder; without it the default settings are run first, 3 to 5 minutes. About 20 minutes besides on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from benchmarks.common import RESULTS, environment, save_cifar10, write_result
from benchmarks.digits_quality import CONFIG, DRAWS, FIRST_NOISE_SEED
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.noise import sampler_noise
from mmd_export.onnx_compose import GraphSpec, compose
from mmd_export.onnx_translate import translate
from mmd_export.parity import artefact_rung
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import GRIDS, HALVES
from mmd_export.precision.half import to_half
from mmd_export.precision.islands import DELICATE, ends, islands
from mmd_export.precision.lower import CALIBRATED, SCANNED, lower, typed
from mmd_export.precision.quantise import Recipe
from mmd_export.precision.scan import scan
from mmd_export.precision.trajectory import Calls
from mmd_export.program import export_program
from mmd_export.runtime import RunOptions, Session
from mmd_export.targets import get_target
from mmd_export.targets.onnx import clean_up, file_size
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder
from mmd_finetune.loop import tune
from mmd_finetune.metrics import frechet_distance
from mmd_finetune.reference import encode_in_batches
from mmd_finetune.settings import make_settings
from mmd_runtime.onnxruntime import chain_session
from mmd_runtime.registry import runtime_for

Run = Callable[[dict[str, NDArray[np.float32]]], NDArray[np.float32]]

BATCH = 128
ELSEWHERE = (("coreml", "fp16"), ("coreml", "w8"), ("coreml", "w6"), ("coreml", "w4"), ("openvino", "w16"))
SHARED = Recipe(per_step=False, seven_bits="none")
TRIALS: dict[str, Recipe] = {
    "minmax": replace(SHARED, clip="minmax"),
    "minmax, a range for each step": Recipe(clip="minmax", seven_bits="none"),
    "percentile": replace(SHARED, clip="percentile"),
    "percentile, a range for each step": Recipe(clip="percentile", seven_bits="none"),
    "mse": SHARED,
    "mse, a range for each step": Recipe(seven_bits="none"),
    "mse, first and last layer too": replace(SHARED, ends=True),
    "mse, linear layers float32": replace(SHARED, linear=False),
    "mse, weights in 7 bits": replace(SHARED, seven_bits="all"),
    "mse, a range for each step, linear weights in 7 bits": Recipe(),
}
CALIBRATIONS = (8, 128)


@dataclass(frozen=True)
class Scores:
    """Held-out Frechet distance of samples to all scans, pooled and by draw, and their error against float32."""

    distance: float
    by_draw: list[float]
    rms_pixel_error: float


class Judge:
    """Runs graphs on the same noises and scores what they give."""

    def __init__(self, checkpoint: Checkpoint, steps: int | None, draws: int) -> None:
        self.checkpoint, self.plan, self.draws = checkpoint, checkpoint.plan_for(steps), draws
        program = export_program(checkpoint.denoiser, self.plan, checkpoint.shape, None, checkpoint.conditions)
        constants = [[value.numpy() for value in program.constants(k)] for k in range(self.plan.step_count)]
        self.calls = Calls(translate(program.step), constants, self.plan, checkpoint.shape, None)
        self.real = torch.from_numpy(load_digits_split().all_images).clone()
        self.encoder = load_encoder(make_settings({"out": "unused"}, CONFIG).holdout[0])
        self.scans = encode_in_batches(self.encoder, self.real)
        self.exact = self.sample(self.graph(self.calls))

    def graph(self, calls: Calls) -> ir.Model:
        """The whole sampler; on a clone, since composing shares the weights' values."""
        model = compose(calls.model.clone(), self.plan, calls.constants, GraphSpec(self.checkpoint.shape, None))
        clean_up(model)
        return model

    def sample(self, model: ir.Model) -> list[NDArray[np.float32]]:
        """As many samples a draw as there are scans."""
        session = session_of(model)
        return self.drawn(lambda part: session.run(["sample"], part)[0])

    def drawn(self, run: Run) -> list[NDArray[np.float32]]:
        """The same of whatever gives the samples of a batch."""
        return [
            np.concatenate([run(part) for part in self._noises(seed)])[: len(self.real)]
            for seed in range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + self.draws)
        ]

    def _noises(self, seed: int) -> Iterator[dict[str, NDArray[np.float32]]]:
        for first in range(0, len(self.real), BATCH):
            yield sampler_noise(seed, BATCH, self.checkpoint.shape, self.plan.noisy_steps, first=first)

    def score(self, draws: list[NDArray[np.float32]]) -> Scores:
        found = [encode_in_batches(self.encoder, torch.from_numpy(images)) for images in draws]
        error = np.concatenate(draws) - np.concatenate(self.exact)
        return Scores(
            round(frechet_distance(torch.cat(found), self.scans), 4),
            [round(frechet_distance(features, self.scans), 4) for features in found],
            round(float(np.sqrt(np.mean(error.astype(np.float64) ** 2))), 6),
        )


def session_of(model: ir.Model, optimised: Path | None = None) -> Any:
    """A session in onnxruntime, which writes what it made of the graph to ``optimised``."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, ["CPUExecutionProvider"])


def integer_kernels(model: ir.Model) -> int:
    """How many nodes onnxruntime computes with integers; without VNNI, 8-bit ones may saturate there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session_of(model, path)
        return sum("QLinear" in node.op_type or "Integer" in node.op_type for node in ir.load(path).graph)


def precisions(judge: Judge, model: str, steps: int | None) -> dict[str, Any]:
    """Each precision as it ships: a bundle, its size, its errors, its distance."""
    rows: dict[str, Any] = {}
    for precision in get_target("onnx").precisions:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            bundle = build(BuildOptions(model, "onnx", Path(folder) / "bundle", steps=steps, precision=precision))
            seconds = time.process_time() - start
            errors = step_errors(bundle)
            size = bundle.artefact_bytes
        lowered = judge.graph(lower(judge.calls, precision))
        runnable = emulated(lowered, HALVES[precision]) if precision in HALVES else lowered
        scores = judge.score(judge.sample(runnable))
        rows[precision] = {
            "bytes": size, "build_cpu_seconds": round(seconds, 1), "errors": errors, **asdict(scores),
            "integer_kernels": integer_kernels(runnable),
            "run_as": "emulated" if precision in HALVES else "onnxruntime",
        }  # fmt: skip
        print(precision, scores, flush=True)
    return rows


def elsewhere(judge: Judge, model: str) -> dict[str, Any]:
    """The precisions of other targets than onnx that can run here, each bundle in its runtime: size and distance."""
    rows: dict[str, Any] = {}
    for target, precision in ELSEWHERE:
        with tempfile.TemporaryDirectory() as folder:
            batch = str(BATCH)
            bundle = build(BuildOptions(model, target, Path(folder) / "bundle", precision, batch, verify=False))
            runtime = runtime_for(bundle.manifest.format)
            session = runtime.open(bundle, RunOptions(threads=torch.get_num_threads()))
            scores = judge.score(judge.drawn(partial(_sample_of, session)))
            rows[f"{target} {precision}"] = {
                "bytes": bundle.artefact_bytes, "runtime": f"{runtime.name}: {runtime.availability().detail}",
                **asdict(scores),
            }  # fmt: skip
        print(target, precision, scores, flush=True)
    return rows


def steps_elsewhere(model: str) -> dict[str, Any]:
    """What their builds find of errors: free-running and, where a step can be run alone, teacher-forced."""
    rows: dict[str, Any] = {}
    for target, precision in ELSEWHERE:
        with tempfile.TemporaryDirectory() as folder:
            bundle = build(BuildOptions(model, target, Path(folder) / "bundle", precision, "1"))
            rows[f"{target} {precision}"] = {
                "images": len(bundle.golden().sample), "errors": dict(bundle.manifest.parity or {})
            }  # fmt: skip
        print(target, precision, rows[f"{target} {precision}"], flush=True)
    return rows


def _sample_of(session: Session, part: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return session.run(part)["sample"].astype(np.float32, copy=False)


def step_errors(bundle: Bundle) -> dict[str, Any]:
    """Rung 6 of a bundle: largest and mean error by what is compared; bf16 and fp16 as a device rounds them."""
    import onnx

    half = HALVES.get(bundle.manifest.precision)
    proto = onnx.load(bundle.artefact_path)
    if half is not None:
        proto = ir.to_proto(emulated(ir.from_proto(proto), half))
    rung = artefact_rung(bundle, None, chain_session(bundle, RunOptions(threads=1), proto))
    return {each.name: {"max": each.max_abs, "mean": each.mean_abs, "faults": each.faults} for each in rung.comparisons}


def trials(judge: Judge) -> list[dict[str, Any]]:
    """int8, everything that was tried."""
    recipes = [(name, recipe, CALIBRATED) for name, recipe in TRIALS.items()]
    recipes += [(f"mse, {images} images", SHARED, images) for images in CALIBRATIONS]
    rows = []
    for name, recipe, images in recipes:
        model = judge.graph(lower(judge.calls, "int8", images, recipe))
        scores = judge.score(judge.sample(model))
        tried = {"name": name, "recipe": asdict(recipe), "images": images, "integer_kernels": integer_kernels(model)}
        rows.append(tried | asdict(scores))
        print(name, scores, flush=True)
    return rows


def island_trials(judge: Judge) -> dict[str, Any]:
    """16 bits with the default islands, and without those of one kind."""
    rows: dict[str, Any] = {}
    for name, half in HALVES.items():
        choices: dict[str, Callable[[ir.Node, str], bool]] = {
            "default": lambda _, reason: bool(reason),
            "no ends": lambda _, reason: reason != "end",
            "norms only": lambda node, reason: reason != "operation" or "Norm" in node.op_type,
            "no delicate operations": lambda _, reason: reason != "operation",
        }
        for choice, keeps in choices.items():
            calls = replace(judge.calls, model=typed(judge.calls.model))
            kept = {**ends(calls.model), **islands(calls.model, scan(calls, SCANNED), half)}
            chosen = {node: reason for node, reason in kept.items() if keeps(node, reason)}
            model = judge.graph(to_half(calls, chosen, half))
            scores = judge.score(judge.sample(emulated(model, half)))
            rows[f"{name}, {choice}"] = {"islands": len(chosen), **asdict(scores)}
            print(name, choice, len(chosen), scores, flush=True)
    return rows


def ranges(judge: Judge) -> dict[str, float]:
    """How much the largest magnitude of a value grows from ``SCANNED`` images to 64: the headroom that a scan needs."""
    few, many = (scan(replace(judge.calls, model=typed(judge.calls.model)), n).largest for n in (SCANNED, 64))
    growth = [many[name] / few[name] for name in few if few[name] > 0.0]
    return {"values": len(growth), "median": statistics.median(growth), "largest": max(growth)}


def sizes() -> dict[str, Any]:
    """Bytes of the artefact on the ddpm-cifar10 architecture (random weights, 5 steps), and its part of fp32's."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = str(save_cifar10(Path(folder) / "model", "v_prediction"))
        checkpoint = load_checkpoint(source)
        plan = checkpoint.plan_for(5, sampler="ddim")
        program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1)
        constants = [[value.numpy() for value in program.constants(k)] for k in range(plan.step_count)]
        calls = Calls(translate(program.step), constants, plan, checkpoint.shape, 1)
        for precision in get_target("onnx").precisions:
            start = time.process_time()
            images = 2 if precision in HALVES or (precision in GRIDS and GRIDS[precision].activations) else None
            lowered = lower(calls, precision, images)
            model = compose(lowered.model, plan, lowered.constants, GraphSpec(checkpoint.shape, 1))
            clean_up(model)
            size = len(ir.to_proto(model).SerializeToString())
            found[precision] = {"bytes": size, "cpu_seconds": round(time.process_time() - start, 1)}
            print(precision, found[precision], file_size(model), flush=True)
    return {name: {**row, "of_fp32": round(row["bytes"] / found["fp32"]["bytes"], 4)} for name, row in found.items()}


PARTS = ("precisions", "elsewhere", "steps_elsewhere", "trials", "islands", "ranges", "sizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="tuned run folder; tuned with finetune/configs/digits.toml if left out")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they were")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = str(tune(make_settings({"seed": 0, "out": Path(folder) / "run"}, CONFIG)).folder)
        judge = Judge(load_checkpoint(model), None, arguments.draws)
        values: dict[str, Any] = {}
        if arguments.out.exists():
            values = json.loads(arguments.out.read_text(encoding="utf-8"))
        values |= {
            "samples_a_draw": len(judge.real), "draws": arguments.draws, "steps": judge.plan.step_count,
            "held_out": judge.encoder.name,
            "default_recipe": asdict(Recipe()), "images": CALIBRATED, "delicate": sorted(DELICATE),
        }  # fmt: skip
        measures: dict[str, Callable[[], Any]] = {
            "precisions": lambda: precisions(judge, model, None),
            "elsewhere": lambda: elsewhere(judge, model),
            "steps_elsewhere": lambda: steps_elsewhere(model),
            "trials": lambda: trials(judge),
            "islands": lambda: island_trials(judge),
            "ranges": lambda: ranges(judge),
            "sizes": sizes,
        }
        for part in arguments.parts:
            values[part] = measures[part]()
            if part == "precisions":  # what the others of the same model are compared with
                values["float32"] = asdict(judge.score(judge.exact))
            values["environments"] = values.get("environments", {}) | {part: environment()}
            values.pop("environment", None), values.pop("script", None)
            write_result(arguments.out, "benchmarks/precision.py", values)


if __name__ == "__main__":
    main()
