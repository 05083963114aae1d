"""What ``gpu.py`` times on a GPU: each way to run one few-step chain from noise to image, ready to be called."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import Checkpoint
from mmd_export.errors import NotAvailableError
from mmd_export.plan import StepPlan
from mmd_export.program import SamplerProgram, export_program
from mmd_export.reference import sampler_of
from mmd_export.runtime import BindingSession, RunOptions
from mmd_export.target_options import TargetOptions
from mmd_export.targets import CompileOptions, get_target
from mmd_export.torch_baselines import baseline
from mmd_export.unroll import UnrolledSampler
from mmd_runtime.onnx_providers import get_provider, open_session, placement, record_placement
from mmd_runtime.registry import get_runtime

Call = Callable[[], object]


def prepare(
    checkpoint: Checkpoint, plan: StepPlan, batch: int, arguments: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Every candidate that works here, how far its image is from the first one's, and why the others do not work.

    An AOTInductor package is captured last: a capture that fails may leave torch's CUDA state unfit for another.
    """
    device = torch.device(arguments.device)
    noise = torch.randn(batch, *checkpoint.shape).to(
        device
    )  # drawn on the CPU, whatever state the GPU's generator is in
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
        "ONNX Runtime CUDA": lambda: onnx_cuda(folder, noise, graph=False),
        "ONNX Runtime CUDA, CUDA graph": lambda: onnx_cuda(folder, noise, graph=True),
        "TensorRT-RTX, CUDA graph": lambda: engine(
            "digits" if arguments.smoke else str(scratch), plan.step_count, noise, scratch / f"rtx-{batch}"
        ),
        "AOTInductor, CUDA graph": lambda: cuda_graph(package(run_single_threaded=True), noise),
    }
    candidates: dict[str, Call] = {}
    images: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make()
            image = call()
        except Exception as error:  # noqa: BLE001 - one backend that fails must not lose the others; the JSON says why
            skipped[name] = first_line(error)
            continue
        candidates[name] = call
        if isinstance(image, torch.Tensor):
            images[name] = image.cpu()
    if "eager" not in images:
        raise RuntimeError(f"batch {batch}: nothing to compare with: {skipped['eager']}")
    differences = {name: float((image - images["eager"]).abs().max()) for name, image in images.items()}
    return candidates, differences, skipped


def first_line(error: Exception) -> str:
    """The kind of an error and how its message begins."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def synchronised(run: Callable[..., Any], noise: torch.Tensor) -> Call:
    """Call and wait for the device; gives the image."""

    def call() -> object:
        with torch.inference_mode():
            image: object = run(noise)
        if noise.is_cuda:
            torch.cuda.synchronize()
        return image

    return call


def pipeline(checkpoint: Checkpoint, plan: StepPlan, noise: torch.Tensor) -> Call:
    """diffusers' own pipeline on the device; it draws its noise itself and gives the pictures on the host."""
    checkpoint.denoiser.to(noise.device)
    return baseline("diffusers", checkpoint, plan, {"noise": noise.cpu().numpy()})[0]


def engine(source: str, steps: int, noise: torch.Tensor, folder: Path) -> Call:
    """The same graph as an engine of TensorRT-RTX for this GPU, bound to the device."""
    if not noise.is_cuda:
        raise RuntimeError("needs CUDA")
    runtime = get_runtime("tensorrt-rtx")
    if not (found := runtime.availability()).available:
        raise NotAvailableError(f"{found.detail}; {found.install}")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    options = BuildOptions(
        source, "tensorrt-rtx", folder, batch=str(len(noise)), steps=steps, sampler="ddim",
        of_target=TargetOptions(compute_capability=capability), verify=False,
    )  # fmt: skip
    session = runtime.open(build(options), RunOptions())
    if not isinstance(session, BindingSession):
        raise NotAvailableError("its session does not bind")
    return session.bind({"noise": noise.cpu().numpy()})


def cuda_graph(sampler: Callable[..., Any], noise: torch.Tensor) -> Call:
    """The whole chain captured once, then replayed; gives the image."""
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
        image = sampler(static)
    replayed = [sampler, image]  # their memory is the graph's: it must live as long

    def call() -> object:
        static.copy_(noise)
        graph.replay()
        torch.cuda.synchronize()
        return replayed[1]

    return call


def compiled_ahead(program: SamplerProgram, folder: Path, device: str) -> Callable[..., Callable[..., Any]]:
    """What loads the package of target torch; if it could not be compiled, loading raises why.

    To be captured it is loaded with ``run_single_threaded``: else it looks for finished runs before each, which no
    capture of a CUDA graph allows.
    """
    folder.mkdir()
    target = get_target("torch")
    try:
        target.compile(program, folder, CompileOptions(target=TargetOptions(device=device)))
    except Exception as error:  # noqa: BLE001 - one backend that fails must not lose the others; the JSON says why
        failure = error

        def fail(**_: bool) -> Callable[..., Any]:
            raise failure

        return fail
    return lambda **how: torch._inductor.aoti_load_package(str(folder / target.artefact), **how)


def onnx_cuda(folder: Path, noise: torch.Tensor, *, graph: bool) -> Call:
    """The shipped graph in ONNX Runtime's CUDA provider, input and output on the device; gives the image."""
    import onnxruntime as ort

    provider, settings = get_provider("cuda"), ort.SessionOptions()
    record_placement(settings)
    session = open_session(ort, provider, str(folder / get_target("onnx").artefact), settings, graph=graph)
    print(placement(provider, session).summary, flush=True)
    binding, sample = session.io_binding(), torch.empty_like(noise)
    for bind, name, tensor in ((binding.bind_input, "noise", noise), (binding.bind_output, "sample", sample)):
        bind(name, "cuda", 0, "float32", tuple(tensor.shape), tensor.data_ptr())

    bound = [noise, sample]  # of which the binding knows the addresses alone: they must live as long

    def call() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return bound[1]

    return call
