"""The builder's process: a job as JSON on stdin, events as JSON lines on stdout, the library's log on stderr.

It is a process of its own because the builder may end it: by a crash, or by taking all memory. Nothing but the library
and the standard library is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmd_export.trt.job import REFUSED, Job

Tell = Callable[..., bool]
_HARDWARE = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


class Refused(Exception):  # noqa: N818 - no error of the program
    """The library cannot build this; the message says why. ``log``: that says more."""

    def __init__(self, why: str, log: bool = False) -> None:
        super().__init__(why)
        self.log = log


def main() -> int:
    """Build what stdin says; 0, or REFUSED after an event that says why."""
    tell = _teller()
    job = Job.from_json(sys.stdin.read())
    try:
        tell(done=build(importlib.import_module(job.module), job, tell))
    except Refused as reason:
        tell(refused=" ".join(str(reason).split()), log=reason.log)
        return REFUSED
    return 0


def build(trt: Any, job: Job, tell: Tell) -> dict[str, Any]:
    """Parse, check, build and write; returns what only the library knows."""
    log = _logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # pybind11's word for a null pointer
        raise Refused(f"its builder does not start: {log.last or error}") from error
    graph = Path(job.onnx)
    trial = builder.create_network(_strongly_typed(trt))  # named, because a parser does not keep its network alive
    tell(support=_support(trt.OnnxParser(trial, log), graph))
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise Refused(_complaint(parser))
    config = builder.create_builder_config()
    capabilities = _configure(trt, config, job)
    for profile in _profiles(builder, network, job.batches):
        config.add_optimization_profile(profile)
    cache = _timing_cache(config, job.timing_cache)
    config.progress_monitor = _monitor(trt, tell)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(
            f"the build failed: {log.last or 'no reason given'}; use --target onnx or another --form", log=True
        )
    Path(job.engine).write_bytes(memoryview(plan))
    if cache is not None and job.timing_cache is not None:
        _keep(Path(job.timing_cache), bytes(memoryview(config.get_timing_cache().serialize())))
    return {"version": trt.__version__, "capabilities": capabilities}


def _support(parser: Any, path: Path) -> bool:
    """Whether this release has a check of every node, which then takes them all.

    Every node that it does not take goes to the log, with the reason; raises Refused that names the first.
    """
    if not hasattr(parser, "supports_model_v2"):
        return False
    if not parser.supports_model_v2(path.read_bytes(), str(path)):
        # The nodes that it takes, in groups; is_subgraph_supported tells of each whether it is the whole graph.
        taken = sum(len(parser.get_subgraph_nodes(i)) for i in range(parser.num_subgraphs))
        for i in range(parser.num_errors):
            sys.stderr.write(f"not taken: {_blamed(parser.get_error(i))}\n")
        others = f"{taken} other node" + ("s" if taken != 1 else "")
        complaint = f"{_complaint(parser)}; it takes {others}; use --target onnx"
        raise Refused(complaint, log=parser.num_errors > 1)
    return True


def _complaint(parser: Any) -> str:
    """The parser's first error, and how many more there are."""
    if not parser.num_errors:
        return "it does not take the graph"
    more = f" and {parser.num_errors - 1} more" if parser.num_errors > 1 else ""
    return f"it does not take node {_blamed(parser.get_error(0))}{more}"


def _blamed(error: Any) -> str:
    """Name, op and reason; older libraries tell the reason alone, some ops have no reason but a code."""
    text = str(error.desc())
    reason = text if text not in ("", "false") else str(error.code()).rpartition(".")[2]
    known = hasattr(error, "node_name") and hasattr(error, "node_operator")
    return f"{error.node_name()!r} ({error.node_operator()}): {reason}" if known else reason


def _configure(trt: Any, config: Any, job: Job) -> list[str]:
    """Set every option; returns the compute capabilities that are built for, where the library lets one choose."""
    flags = trt.BuilderFlag
    if hasattr(flags, "TF32"):  # 10 bits of mantissa are not float32
        config.clear_flag(flags.TF32)
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace << 20)
    wanted = {
        "VERSION_COMPATIBLE": job.version_compat,
        "REFIT": job.refit,
        "STRIP_PLAN": job.strip_weights,
        "REFIT_IDENTICAL": job.strip_weights and not job.refit and hasattr(flags, "REFIT_IDENTICAL"),
    }
    for name, on in wanted.items():
        if on:
            config.set_flag(_member(flags, name))
    if job.hardware_compat is not None:
        levels = _member(trt, "HardwareCompatibilityLevel")
        config.hardware_compatibility_level = _member(levels, _HARDWARE[job.hardware_compat])
    return _set_capabilities(trt, config, job)


def _set_capabilities(trt: Any, config: Any, job: Job) -> list[str]:
    """Those that are wanted, else all from the least on; none where the library builds for the GPU at hand."""
    if not hasattr(trt, "ComputeCapability"):
        return []
    known = {_dotted(name): member for name, member in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    chosen = list(job.capabilities) or [text for text in known if _tuple(text) >= _tuple(job.least_capability)]
    for text in chosen:
        if text not in known:
            raise Refused(f"it has no compute capability {text}; it has {', '.join(sorted(known, key=_tuple))}")
    config.num_compute_capabilities = len(chosen)
    for place, text in enumerate(chosen):
        if not config.set_compute_capability(known[text], place):
            raise Refused(f"it does not take compute capability {text}")
    return chosen


def _dotted(name: str) -> str:
    """``SM89`` is 8.9, ``SM120`` is 12.0."""
    return f"{name[2:-1]}.{name[-1]}"


def _tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _profiles(builder: Any, network: Any, batches: Sequence[tuple[int, int, int]]) -> list[Any]:
    """An optimisation profile for each of ``batches``: the free dimension of every input is its number of images."""
    made = []
    for sizes in batches:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            value = network.get_input(i)
            profile.set_shape(value.name, *(tuple(n if d < 0 else d for d in value.shape) for n in sizes))
        made.append(profile)
    return made


def _timing_cache(config: Any, file: str | None) -> Any:
    """The timings of earlier builds, so that the next one measures less and chooses the same."""
    if file is None or not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(_kept(Path(file)))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")  # of another GPU or release: start again
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _kept(path: Path) -> bytes:
    """What is in the file; nothing where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _keep(path: Path, data: bytes) -> None:
    """A folder that is full or read-only costs the next build its timings, not this one its engine."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        sys.stderr.write(f"[W] the timings are not kept in {path}: {error.strerror or error}\n")
        with suppress(OSError):
            partial.unlink()


def _strongly_typed(trt: Any) -> int:
    """The flag of networks whose precision is written in the graph; release 11 has no other kind and may lack it."""
    kinds = getattr(trt, "NetworkDefinitionCreationFlag", None)
    flag = getattr(kinds, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _member(kind: Any, name: str) -> Any:
    """A name of an enumeration of the library; raises Refused where this release has not got it."""
    if not hasattr(kind, name):
        raise Refused(
            f"this release has no {getattr(kind, '__name__', kind)}.{name}; leave the option out or update it"
        )
    return getattr(kind, name)


def _logger(trt: Any) -> Any:
    """The library's log, a line a message, on stderr; ``last`` is the last error."""

    def init(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.last = ""

    def log(self: Any, severity: Any, message: str) -> None:
        name = str(severity).rpartition(".")[2]
        if name == "VERBOSE":
            return
        text = " ".join(str(message).split())
        if "ERROR" in name:
            self.last = text
        sys.stderr.write(f"[{name[0]}] {text}\n")

    # A class of a foreign base cannot be written as a statement: the base is only known here.
    return type("Log", (trt.ILogger,), {"__init__": init, "log": log})()


def _monitor(trt: Any, tell: Tell) -> Any:
    """Tells every phase and step; a step that nobody hears any more ends the build."""
    steps: dict[str, int] = {}

    def init(self: Any) -> None:
        trt.IProgressMonitor.__init__(self)

    def phase_start(_: Any, name: str, parent: str | None, count: int) -> None:
        steps[name] = count
        tell(phase=name, top=parent is None)

    def step_complete(_: Any, name: str, step: int) -> bool:
        return tell(phase=name, step=step, of=steps.get(name, 0))

    methods = {
        "__init__": init,
        "phase_start": phase_start,
        "phase_finish": lambda _, name: steps.pop(name, None),
        "step_complete": step_complete,
    }
    return type("Monitor", (trt.IProgressMonitor,), methods)()


def _teller() -> Tell:
    """Events go to what stdout was; stdout itself becomes stderr, because a library may print."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> bool:
        try:
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()
        except BrokenPipeError:
            return False
        return True

    return tell


if __name__ == "__main__":
    sys.exit(main())
