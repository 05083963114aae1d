"""From a checked ONNX file to an engine and its lock: the cache first, then the builder's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmd_export.batch import BatchSpec
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.folders import scratch_folder
from mmd_export.target_options import TargetOptions
from mmd_export.trt.cache import cache_folder, find, key_of, sha256_of, store
from mmd_export.trt.device import Device, find_device
from mmd_export.trt.job import Job, profile_batches
from mmd_export.trt.library import Library, system
from mmd_export.trt.lint import require_buildable
from mmd_export.trt.lock import ANY_SYSTEM, LockFacts
from mmd_export.trt.process import run_job
from mmd_export.trt.rewrite import rewritten

AMPERE = "8.0"
# What makes an engine of a graph beside the library: a change of it is another key in the cache.
_BUILDER = tuple(Path(__file__).parent / name for name in ("worker.py", "rewrite.py", "../onnx_nodes.py"))
# TensorRT-RTX 1.7.1 refuses what is below (measured); full TensorRT builds for the GPU at hand.
_LEAST_CAPABILITY = {"fp8": "8.9", "bf16": AMPERE}
_NOT_IN_THE_BYTES = ("onnx", "engine", "memory_limit", "timing_cache")


@dataclass(frozen=True)
class Request:
    """What to build: the graph, written in ``precision``, for which batches, how; ``log``: that of a failure."""

    onnx: Path
    batch: BatchSpec
    options: TargetOptions
    precision: str = "fp32"
    log: Path | None = None
    notify: Callable[[str], None] = lambda _: None


def build_engine(library: Library, request: Request, engine: Path) -> LockFacts:
    """Write ``engine``; raises NotAvailableError in one line whatever stops it."""
    device = find_device()
    require_gpu_where_needed(library, request.options, device)
    require_capable(request.precision, request.options)
    nodes = require_buildable(request.onnx, library.title)
    digest, folder = onnx_sha256(request.onnx), cache_folder(request.options.cache)
    job = job_for(library, request, engine, folder, device, library.version)
    key = engine_key(library, job, digest, library.version, device)
    said = find(folder, key, engine)
    if said is not None:
        request.notify(f"{library.title}: engine {key[:12]} was built before, taken from {folder}")
    else:
        request.notify(f"{library.title}: building an engine of {nodes:,} nodes")
        make_cache(folder)
        with scratch_folder() as scratch:
            if library.rewrite:
                job = replace(job, onnx=str(rewritten(request.onnx.absolute(), scratch)))
            said = run_job(job, library.title, request.log, request.notify, folder / f"{key}.log")
        _keep(folder, key, engine, said, request.notify)
    return _facts(library, request.options, digest, said, device)


def make_cache(folder: Path) -> None:
    """The folder of the cache, before what takes long rather than after it; raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--cache {folder} cannot be made: {error.strerror}; choose another folder") from error


def _keep(folder: Path, key: str, engine: Path, said: dict[str, Any], notify: Callable[[str], None]) -> None:
    """Put the engine into the cache; a full or read-only one costs the next build its time, not this one its engine."""
    try:
        store(folder, key, engine, said)
    except OSError as error:
        notify(f"warning: --cache {folder} cannot keep the engine: {error.strerror or error}")


def require_gpu_where_needed(library: Library, options: TargetOptions, device: Device | None) -> None:
    """Raise NotAvailableError where the library, or an option of it, builds on a GPU only and there is none."""
    if device is not None:
        return
    if library.needs_gpu:
        raise NotAvailableError(f"{library.title} builds for the GPU at hand, and there is none; use --defer")
    for name, given in (("--refit", options.refit), ("--strip-weights", options.strip_weights)):
        if given:
            raise NotAvailableError(f"{library.title} needs a GPU for {name}, and there is none; use --defer")


def require_capable(precision: str, options: TargetOptions) -> None:
    """Raise NotAvailableError for GPUs that lack the precision."""
    least, wanted = _LEAST_CAPABILITY.get(precision), options.compute_capability
    if least is None or wanted is None:
        return
    for capability in wanted.split(","):
        if tuple(map(int, capability.split("."))) < tuple(map(int, least.split("."))):
            raise NotAvailableError(
                f"--precision {precision} needs compute capability {least}, --compute-capability has "
                f"{capability}; give {least} or more"
            )


def onnx_files(path: Path) -> list[Path]:
    """The graph and its file of weights, if it has one."""
    data = path.with_name(f"{path.name}_data")
    return [path, data] if data.exists() else [path]


def onnx_sha256(path: Path) -> str:
    """Of the graph with its weights."""
    return sha256_of(onnx_files(path))


def job_for(
    library: Library, request: Request, engine: Path, cache: Path, device: Device | None, version: str = ""
) -> Job:
    """What the builder's process is told."""
    options, batch = request.options, request.batch
    timings = None
    if library.needs_gpu and device is not None:  # that of TensorRT-RTX changes nothing but asks for a GPU
        timings = str((cache / f"timings-{version}-{device.capability}.bin").absolute())
    return Job(
        library.module,
        str(request.onnx.absolute()),
        str(engine.absolute()),
        profile_batches(batch.sizes, batch.range),
        tuple(options.compute_capability.split(",")) if options.compute_capability else (),
        _LEAST_CAPABILITY.get(request.precision, AMPERE),
        options.workspace,
        options.memory_limit,
        options.hardware_compat,
        bool(options.version_compat),
        bool(options.refit),
        bool(options.strip_weights),
        timings,
    )


def engine_key(library: Library, job: Job, digest: str, version: str, device: Device | None) -> str:
    """The name of the engine in the cache: a hash of everything that its bytes depend on."""
    facts: dict[str, Any] = {name: value for name, value in vars(job).items() if name not in _NOT_IN_THE_BYTES}
    if library.needs_gpu and device is not None:
        facts |= {"device": vars(device), "system": system()}
    builder = sha256_of(_BUILDER)  # what we ask the library for beside the job
    return key_of({**facts, "onnx_sha256": digest, "version": version, "builder": builder})


def _facts(
    library: Library, options: TargetOptions, digest: str, said: dict[str, Any], device: Device | None
) -> LockFacts:
    """The lock. Where no GPU took part in the build, none is a fact; those engines run on any system."""
    capabilities = ",".join(said["capabilities"])
    if not library.needs_gpu or device is None:
        return LockFacts(library.name, said["version"], ANY_SYSTEM, capabilities, digest)
    return LockFacts(
        library.name,
        said["version"],
        system(),
        f"{AMPERE}+" if options.hardware_compat == "ampere+" else device.capability,
        digest,
        device.name,
        device.driver,
        device.cuda,
        "yes" if options.version_compat else "no",
    )
