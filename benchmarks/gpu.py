"""Everything that wants an NVIDIA GPU: ``make gpu OUT=folder [PART=latency|parity|tune|finetune|cifar10]``.

Each part writes ``gpu_<part>.json`` to the folder, again after everything that it measured, and a broken run goes on
where it was; a part that fails does not stop the next. Runs from the source tree without an installation, with torch
for CUDA and the packages of ``NEEDED``; ONNX Runtime and TensorRT-RTX where they are. ``--device cpu --smoke`` tries
the code out where there is no GPU and marks its result so. Part ``cifar10`` needs ``DATA=folder``, see
``benchmarks/cifar10.py``; it goes on cell by cell, and its run folders stay in ``runs/cifar10``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "finetune"), str(ROOT / "runtimes/python")]
NEEDED = ("torch", "diffusers", "pydantic", "safetensors", "onnx", "onnxscript")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    sys.exit(f"benchmarks/gpu.py: not installed: {', '.join(missing)}")

import torch  # noqa: E402 - the source tree has to be on the path first

from benchmarks.common import save_cifar10, write_result  # noqa: E402
from benchmarks.gpu_candidates import first_line, prepare  # noqa: E402
from mmd_export.build import BuildOptions, build  # noqa: E402
from mmd_export.bundle import Bundle  # noqa: E402
from mmd_export.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from mmd_export.latency import measure  # noqa: E402
from mmd_export.parity import check_artefact  # noqa: E402
from mmd_export.plan import StepPlan  # noqa: E402
from mmd_export.reference import golden_inputs, run_chain, sampler_of  # noqa: E402
from mmd_export.runtime import RunOptions  # noqa: E402
from mmd_export.target_options import TargetOptions  # noqa: E402
from mmd_finetune.compute import full_float32  # noqa: E402
from mmd_runtime.registry import get_runtime  # noqa: E402

STEPS = 5
BATCHES = (1, 64)
ROUNDS = 100


class PartFile:
    """``gpu_<part>.json``: what was measured so far, on this device, and whether it is all.

    Args:
        path: the file; ``values`` begins with what it holds. A trial is written over.
        device: the name of the GPU, or ``cpu``.
        smoke: whether the part is only tried out.

    Raises:
        FileExistsError: the file holds a measurement of another device, or this is a trial.
    """

    def __init__(self, path: Path, device: str, *, smoke: bool) -> None:
        self.path, self.facts = path, {"device": device, "smoke": smoke}
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(known.get(name) == value for name, value in self.facts.items())
        if known and not same and not known["smoke"]:
            found = {name: known[name] for name in self.facts}
            raise FileExistsError(f"{path.name} holds {found}, this is {self.facts}; choose another --out")
        self.complete: bool = same and known["complete"]
        self.values: dict[str, Any] = known["values"] if same else {}

    def keep(self, *, complete: bool = False) -> None:
        """Write ``values``."""
        facts = {**self.facts, "complete": complete, "values": self.values}
        write_result(self.path, "benchmarks/gpu.py", facts)


def cifar10(folder: Path) -> tuple[Checkpoint, StepPlan]:
    """The ddpm-cifar10 architecture and its 5-step DDIM plan."""
    checkpoint = load_checkpoint(save_cifar10(folder))
    return checkpoint, checkpoint.plan_for(STEPS, sampler="ddim")


def digits() -> tuple[Checkpoint, StepPlan]:
    """The built-in model and its 5-step plan."""
    checkpoint = load_checkpoint("digits")
    return checkpoint, checkpoint.plan_for(STEPS)


def latency(arguments: argparse.Namespace, file: PartFile) -> None:
    """Seconds of one sample call, all candidates interleaved, for each batch."""
    model = "digits" if arguments.smoke else "ddpm-cifar10 architecture"
    file.values |= {"steps": STEPS, "model": f"{model}, float32, TF32 off"}
    results: dict[str, Any] = file.values.setdefault("batches", {})
    with tempfile.TemporaryDirectory() as scratch, full_float32():
        checkpoint, plan = digits() if arguments.smoke else cifar10(Path(scratch))
        for batch in BATCHES[:1] if arguments.smoke else BATCHES:
            if str(batch) in results:
                continue
            candidates, differences, skipped = prepare(checkpoint, plan, batch, arguments, Path(scratch))
            report = measure(candidates, 3 if arguments.smoke else ROUNDS, warmup=1 if arguments.smoke else 30)
            results[str(batch)] = {
                "median_seconds": {name: report.summary(name).median for name in candidates},
                "ratio_to_eager": {name: vars(report.ratio(name, "eager")) for name in candidates},
                "largest_difference_to_eager": differences,
                "skipped": skipped,
            }
            print(batch, results[str(batch)], flush=True)
            file.keep()


def parity(arguments: argparse.Namespace, file: PartFile) -> None:
    """Largest error after every step on the device against the float64 reference on the CPU: torch, then artefacts."""
    file.values["steps"] = STEPS
    results: dict[str, Any] = file.values.setdefault("max_abs_error", {})
    artefacts: dict[str, Any] = file.values.setdefault("artefacts", {})
    with tempfile.TemporaryDirectory() as scratch, full_float32():
        models = {"digits": (digits(), "digits")}
        if not arguments.smoke:
            folder = Path(scratch) / "cifar10"
            models["ddpm-cifar10 architecture"] = (cifar10(folder), str(folder))
        for name, ((checkpoint, plan), source) in models.items():
            inputs = golden_inputs(checkpoint, plan, 4)
            exact = run_chain(sampler_of(checkpoint.as_double(), plan), inputs, torch.float64)
            sampler = sampler_of(checkpoint, plan).to(arguments.device)
            with torch.inference_mode():
                states = list(sampler.chain(torch.from_numpy(inputs["noise"]).to(arguments.device)))
            found = {f"state.{k}": state.cpu().numpy() for k, state in enumerate(states, start=1)}
            results[name] = {key: float(abs(value - exact[key]).max()) for key, value in found.items()}
            print(name, results[name], flush=True)
            file.keep()
            batches = BATCHES[:1] if arguments.smoke else BATCHES
            found = artefacts.setdefault(name, {})
            verify(found, source, Path(scratch) / f"bundles-{name[:6]}", arguments.device, batches, file.keep)


def verify(
    found: dict[str, Any], source: str, folder: Path, device: str, batches: Sequence[int], keep: Callable[[], None]
) -> None:
    """Into ``found``: each artefact of the device, through its runtime against the golden file: errors, or why not.

    At each batch size; ONNX Runtime on a GPU with a captured CUDA graph too.
    """
    wanted = {
        "onnx": (TargetOptions(), "onnxruntime:cuda" if device == "cuda" else "onnxruntime"),
        "torch": (TargetOptions(device=device), "aotinductor"),
        "tensorrt-rtx": (TargetOptions(), "tensorrt-rtx"),
    }
    for (target, (chosen, name)), batch in itertools.product(wanted.items(), batches):
        options = BuildOptions(
            source, target, folder / f"{target}-{batch}", batch=str(batch),
            steps=STEPS, sampler="ddim", of_target=chosen, verify=False,
        )  # fmt: skip
        for graph in (False, True) if name == "onnxruntime:cuda" else (False,):
            what = f"{target} in {name}, batch {batch}{', CUDA graph' if graph else ''}"
            if what in found:
                continue
            try:
                bundle = Bundle.open(options.out) if options.out.exists() else build(options)
                rung = check_artefact(bundle, get_runtime(name), RunOptions(cuda_graph=graph))
                errors = {each.name: each.max_abs for each in rung.comparisons}
                found[what] = {"passed": rung.passed, "max_abs_error": errors}
            except Exception as error:  # noqa: BLE001 - as in prepare
                found[what] = {"not_run": first_line(error)}
            print(what, found[what], flush=True)
            keep()


def tune(arguments: argparse.Namespace, file: PartFile) -> None:
    """The digits run on the device: held-out distance before and after, and seconds."""
    from mmd_finetune.loop import tune as run
    from mmd_finetune.settings import make_settings

    with tempfile.TemporaryDirectory() as scratch:
        short = {"iterations": 1, "batch_size": 16, "evaluate_count": 128} if arguments.smoke else {}
        given = {"model": "digits", "steps": STEPS, "out": Path(scratch) / "run", "device": arguments.device}
        result = run(make_settings(given | short))
    facts = {name: value for name, value in vars(result).items() if name != "folder"}
    print(facts, flush=True)
    file.values |= {"steps": STEPS, "run": facts}


def finetune(arguments: argparse.Namespace, file: PartFile) -> None:
    """Speed and memory of tuning against the plain loop: ``finetune_speed.py``, in a process of its own."""
    out = arguments.out.resolve() / f"finetune_speed_{arguments.device}.json"
    what = f"{file.facts['device']}{' smoke' if arguments.smoke else ''}"
    work = ROOT / "runs/finetune_speed" / what.replace(" ", "-")
    options = ["--device", arguments.device, "--out", str(out), "--work", str(work)]
    short = ["--models", "digits", "--rounds", "2"] if arguments.smoke else []
    # All of it, carried packages too, but not this folder, whose openvino.py is not the package.
    path = [each for each in sys.path if each and Path(each) != ROOT / "benchmarks"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "benchmarks.finetune_speed", *options, *short]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    values: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    file.values["models"] = values["models"]
    shutil.rmtree(work)  # measured again where the result is deleted


def cifar10_budgets(arguments: argparse.Namespace, file: PartFile) -> None:
    """A base model trained and tuned on CIFAR-10, by step budget."""
    from benchmarks import cifar10 as budgets

    if arguments.data is None or not (arguments.data / "weights").is_dir():
        raise SystemExit(f"part cifar10: --data {arguments.data} has no weights/; make gpu PART=cifar10 DATA=folder")
    file.values |= budgets.run(
        argparse.Namespace(
            steps=budgets.BUDGETS[:1] if arguments.smoke else budgets.BUDGETS,
            seeds=[0],
            methods=["untuned", "ours"],
            device=arguments.device,
            runs=ROOT / ("runs/cifar10-smoke" if arguments.smoke else "runs/cifar10"),
            out=arguments.out / "cifar10.json",
            data=arguments.data,
            smoke=arguments.smoke,
        )
    )


PARTS: dict[str, Callable[[argparse.Namespace, PartFile], None]] = {
    "latency": latency,
    "parity": parity,
    "tune": tune,
    "finetune": finetune,
    "cifar10": cifar10_budgets,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--data", type=Path, help="what part cifar10 works on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="few rounds, to try the script out")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing was measured", file=sys.stderr)
        return 3
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    failed = False
    for name, part in PARTS.items():
        if arguments.part not in (name, "all") or (
            arguments.part == "all" and name == "cifar10" and not arguments.data
        ):
            continue
        try:
            file = PartFile(arguments.out / f"gpu_{name}.json", device, smoke=arguments.smoke)
            if file.complete:
                print(f"{file.path.name} is there already; delete it to measure again")
                continue
            part(arguments, file)
        except Exception:  # noqa: BLE001 - the parts have nothing to do with one another
            traceback.print_exc()
            failed = True
            continue
        file.keep(complete=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
