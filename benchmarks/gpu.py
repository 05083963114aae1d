"""Everything that wants an NVIDIA GPU: ``make gpu OUT=folder [PART=latency|parity|tune|finetune|cifar10]``.

Each part writes ``gpu_<part>.json`` to the folder and is skipped if that file is there, so a broken run goes on where
it was. Needs torch with CUDA and diffusers; runs from the source tree without an installation. ``--device cpu --smoke``
tries the code out where there is no GPU and marks its result so. Part ``cifar10`` needs ``DATA=folder``, see
``benchmarks/cifar10.py``; it goes on cell by cell, and its run folders stay in ``runs/cifar10``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "finetune"), str(ROOT / "runtimes/python")]

import torch  # noqa: E402 - the source tree has to be on the path first

from benchmarks.common import save_cifar10, write_result  # noqa: E402
from mmd_export.build import BuildOptions, build  # noqa: E402
from mmd_export.bundle import Bundle  # noqa: E402
from mmd_export.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from mmd_export.errors import MmdExportError, NotAvailableError  # noqa: E402
from mmd_export.latency import measure  # noqa: E402
from mmd_export.parity import check_artefact  # noqa: E402
from mmd_export.plan import StepPlan  # noqa: E402
from mmd_export.program import SamplerProgram, export_program  # noqa: E402
from mmd_export.reference import golden_inputs, run_chain, sampler_of  # noqa: E402
from mmd_export.runtime import BindingSession, RunOptions  # noqa: E402
from mmd_export.target_options import TargetOptions  # noqa: E402
from mmd_export.targets import CompileOptions, get_target  # noqa: E402
from mmd_export.torch_baselines import baseline  # noqa: E402
from mmd_export.unroll import UnrolledSampler  # noqa: E402
from mmd_runtime.onnx_providers import get_provider, open_session, placement, record_placement  # noqa: E402
from mmd_runtime.registry import get_runtime  # noqa: E402

STEPS = 5
BATCHES = (1, 64)
ROUNDS = 100

Call = Callable[[], object]


def cifar10(folder: Path) -> tuple[Checkpoint, StepPlan]:
    """The ddpm-cifar10 architecture and its 5-step DDIM plan."""
    checkpoint = load_checkpoint(save_cifar10(folder))
    return checkpoint, checkpoint.plan_for(STEPS, sampler="ddim")


def digits() -> tuple[Checkpoint, StepPlan]:
    """The built-in model and its 5-step plan."""
    checkpoint = load_checkpoint("digits")
    return checkpoint, checkpoint.plan_for(STEPS)


def latency(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one sample call, all candidates interleaved, for each batch."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, plan = digits() if arguments.smoke else cifar10(Path(scratch))
        for batch in BATCHES[:1] if arguments.smoke else BATCHES:
            candidates, skipped = prepare(checkpoint, plan, batch, arguments, Path(scratch))
            report = measure(candidates, 3 if arguments.smoke else ROUNDS, warmup=1 if arguments.smoke else 30)
            ratios = {name: vars(report.ratio(name, "eager")) for name in candidates}
            medians = {name: report.summary(name).median for name in candidates}
            results[str(batch)] = {"median_seconds": medians, "ratio_to_eager": ratios, "skipped": skipped}
            print(batch, medians, skipped, flush=True)
    return {"steps": STEPS, "model": "ddpm-cifar10 architecture, float32, TF32 off", "batches": results}


def prepare(
    checkpoint: Checkpoint, plan: StepPlan, batch: int, arguments: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Call], dict[str, str]]:
    """Every candidate that works here, and why the others do not."""
    device = torch.device(arguments.device)
    noise = torch.randn(batch, *checkpoint.shape, device=device)
    program = export_program(checkpoint.denoiser.cpu(), plan, checkpoint.shape, batch)
    folder = scratch / f"onnx-{batch}"
    folder.mkdir()
    get_target("onnx").compile(program, folder, CompileOptions())  # before the weights move to the device
    package = compiled_ahead(program, scratch / f"torch-{batch}", arguments.device)
    special = UnrolledSampler(program.denoiser, plan).eval().to(device)
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: synchronised(sampler_of(checkpoint, plan).to(device), noise),
        "specialised eager": lambda: synchronised(special, noise),
        "specialised, CUDA graph": lambda: cuda_graph(special, noise),
        "torch.compile": lambda: synchronised(torch.compile(special), noise),
        "torch.compile, CUDA graphs": lambda: synchronised(torch.compile(special, mode="reduce-overhead"), noise),
        "diffusers pipeline": lambda: pipeline(checkpoint, plan, noise),
        "AOTInductor": lambda: synchronised(package(), noise),
        "AOTInductor, CUDA graph": lambda: cuda_graph(package(), noise),
        "ONNX Runtime CUDA": lambda: onnx_cuda(folder, noise, graph=False),
        "ONNX Runtime CUDA, CUDA graph": lambda: onnx_cuda(folder, noise, graph=True),
        "TensorRT-RTX, CUDA graph": lambda: engine(
            "digits" if arguments.smoke else str(scratch), noise, scratch / f"rtx-{batch}"
        ),
    }
    candidates: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    for name, make in makers.items():
        try:
            candidates[name] = make()
            candidates[name]()
        except Exception as error:  # noqa: BLE001 - one backend that fails must not lose the others; the JSON says why
            candidates.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return candidates, skipped


def synchronised(run: Callable[..., Any], noise: torch.Tensor) -> Call:
    """Call and wait for the device."""

    def call() -> None:
        with torch.inference_mode():
            run(noise)
        if noise.is_cuda:
            torch.cuda.synchronize()

    return call


def pipeline(checkpoint: Checkpoint, plan: StepPlan, noise: torch.Tensor) -> Call:
    """diffusers' own pipeline on the device; it draws its noise itself and gives the pictures on the host."""
    checkpoint.denoiser.to(noise.device)
    return baseline("diffusers", checkpoint, plan, {"noise": noise.cpu().numpy()})[0]


def engine(source: str, noise: torch.Tensor, folder: Path) -> Call:
    """The same graph as an engine of TensorRT-RTX for this GPU, bound to the device."""
    if not noise.is_cuda:
        raise RuntimeError("needs CUDA")
    runtime = get_runtime("tensorrt-rtx")
    if not (found := runtime.availability()).available:
        raise NotAvailableError(f"{found.detail}; {found.install}")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    options = BuildOptions(
        source, "tensorrt-rtx", folder, batch=str(len(noise)), steps=STEPS, sampler="ddim",
        of_target=TargetOptions(compute_capability=capability), verify=False,
    )  # fmt: skip
    session = runtime.open(build(options), RunOptions())
    if not isinstance(session, BindingSession):
        raise NotAvailableError("its session does not bind")
    return session.bind({"noise": noise.cpu().numpy()})


def cuda_graph(sampler: Callable[..., Any], noise: torch.Tensor) -> Call:
    """The whole chain captured once, then replayed."""
    if not noise.is_cuda:
        raise RuntimeError("needs CUDA")
    static = noise.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            sampler(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        sampler(static)

    def call() -> None:
        static.copy_(noise)
        graph.replay()
        torch.cuda.synchronize()

    return call


def compiled_ahead(program: SamplerProgram, folder: Path, device: str) -> Callable[[], Callable[..., Any]]:
    """What loads the package of target torch; if it could not be compiled, loading raises why."""
    folder.mkdir()
    target = get_target("torch")
    try:
        target.compile(program, folder, CompileOptions(target=TargetOptions(device=device)))
    except Exception as error:  # noqa: BLE001 - one backend that fails must not lose the others; the JSON says why
        failure = error

        def fail() -> Callable[..., Any]:
            raise failure

        return fail
    return lambda: torch._inductor.aoti_load_package(str(folder / target.artefact))


def onnx_cuda(folder: Path, noise: torch.Tensor, *, graph: bool) -> Call:
    """The shipped graph in ONNX Runtime's CUDA provider, input and output on the device."""
    import onnxruntime as ort

    provider, settings = get_provider("cuda"), ort.SessionOptions()
    record_placement(settings)
    session = open_session(ort, provider, str(folder / get_target("onnx").artefact), settings, graph=graph)
    print(placement(provider, session).summary, flush=True)
    binding, sample = session.io_binding(), torch.empty_like(noise)
    for bind, name, tensor in ((binding.bind_input, "noise", noise), (binding.bind_output, "sample", sample)):
        bind(name, "cuda", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
    return lambda: session.run_with_iobinding(binding)


def parity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest error after every step on the device against the float64 reference on the CPU: torch, then artefacts."""
    results: dict[str, Any] = {}
    artefacts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = {"digits": (digits(), "digits")}
        if not arguments.smoke:
            folder = Path(scratch) / "cifar10"
            models["ddpm-cifar10 architecture"] = (cifar10(folder), str(folder))
        for name, ((checkpoint, plan), source) in models.items():
            batches = BATCHES[:1] if arguments.smoke else BATCHES
            artefacts[name] = verified(source, Path(scratch) / f"bundles-{name[:6]}", arguments.device, batches)
            inputs = golden_inputs(checkpoint, plan, 4)
            exact = run_chain(sampler_of(checkpoint.as_double(), plan), inputs, torch.float64)
            sampler = sampler_of(checkpoint, plan).to(arguments.device)
            with torch.inference_mode():
                states = list(sampler.chain(torch.from_numpy(inputs["noise"]).to(arguments.device)))
            found = {f"state.{k}": state.cpu().numpy() for k, state in enumerate(states, start=1)}
            results[name] = {key: float(abs(value - exact[key]).max()) for key, value in found.items()}
            print(name, results[name], flush=True)
    return {"steps": STEPS, "max_abs_error": results, "artefacts": artefacts}


def verified(source: str, folder: Path, device: str, batches: Sequence[int]) -> dict[str, Any]:
    """Each artefact of the device, through its runtime against the golden file: errors, or why there are none.

    At each batch size; ONNX Runtime on a GPU with a captured CUDA graph too.
    """
    wanted = {
        "onnx": (TargetOptions(), "onnxruntime:cuda" if device == "cuda" else "onnxruntime"),
        "torch": (TargetOptions(device=device), "aotinductor"),
        "tensorrt-rtx": (TargetOptions(), "tensorrt-rtx"),
    }
    found: dict[str, Any] = {}
    for (target, (chosen, name)), batch in itertools.product(wanted.items(), batches):
        options = BuildOptions(
            source, target, folder / f"{target}-{batch}", batch=str(batch),
            steps=STEPS, sampler="ddim", of_target=chosen, verify=False,
        )  # fmt: skip
        for graph in (False, True) if name == "onnxruntime:cuda" else (False,):
            what = f"{target} in {name}, batch {batch}{', CUDA graph' if graph else ''}"
            try:
                bundle = Bundle.open(options.out) if options.out.exists() else build(options)
                rung = check_artefact(bundle, get_runtime(name), RunOptions(cuda_graph=graph))
                errors = {each.name: each.max_abs for each in rung.comparisons}
                found[what] = {"passed": rung.passed, "max_abs_error": errors}
            except MmdExportError as error:
                found[what] = {"not_run": str(error)}
            print(what, found[what], flush=True)
    return found


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """The digits run on the device: held-out distance before and after, and seconds."""
    from mmd_finetune.loop import tune as run
    from mmd_finetune.settings import make_settings

    with tempfile.TemporaryDirectory() as scratch:
        short = {"iterations": 1, "batch_size": 16, "evaluate_count": 128} if arguments.smoke else {}
        given = {"model": "digits", "steps": STEPS, "out": Path(scratch) / "run", "device": arguments.device}
        result = run(make_settings(given | short))
    facts = {name: value for name, value in vars(result).items() if name != "folder"}
    print(facts, flush=True)
    return {"steps": STEPS, "run": facts}


def finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of tuning against the plain loop: ``finetune_speed.py``, in a process of its own."""
    folder = arguments.out.resolve()
    out, work = folder / "finetune_speed_cuda.json", folder / "finetune_speed"
    options = ["--device", arguments.device, "--out", str(out), "--work", str(work)]
    short = ["--models", "digits", "--rounds", "2"] if arguments.smoke else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:3])}
    command = [sys.executable, "-m", "benchmarks.finetune_speed", *options, *short]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    values: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {"models": values["models"]}


def cifar10_budgets(arguments: argparse.Namespace) -> dict[str, Any]:
    """A base model trained and tuned on CIFAR-10, by step budget."""
    from benchmarks import cifar10 as budgets

    if arguments.data is None or not (arguments.data / "weights").is_dir():
        raise SystemExit(f"part cifar10: --data {arguments.data} has no weights/; make gpu PART=cifar10 DATA=folder")
    return budgets.run(
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


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "parity": parity,
    "latency": latency,
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
    for name, part in PARTS.items():
        path = arguments.out / f"gpu_{name}.json"
        if arguments.part not in (name, "all") or (
            arguments.part == "all" and name == "cifar10" and not arguments.data
        ):
            continue
        if path.exists():
            print(f"{path.name} is there already; delete it to measure again")
            continue
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        values = part(arguments)
        write_result(path, "benchmarks/gpu.py", {"device": device, "smoke": arguments.smoke, **values})
    return 0


if __name__ == "__main__":
    sys.exit(main())
