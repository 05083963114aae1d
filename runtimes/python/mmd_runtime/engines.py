"""Engines of TensorRT and TensorRT-RTX: what both runtimes share. No torch.

An engine is opened only after its lock holds on this machine. Static batches run as one CUDA graph, captured when the
bundle is opened.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle, TensorSpec
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session
from mmd_export.trt.device import Device, find_device
from mmd_export.trt.engine import onnx_sha256
from mmd_export.trt.library import Library
from mmd_export.trt.lock import LockFacts, require_lock
from mmd_export.trt.packing import read_engine
from mmd_runtime.chunks import check_inputs
from mmd_runtime.cuda import INSTALL, MODULE, Cuda, installed

GRAPH = "model.onnx"  # beside an engine without weights


class EngineRuntime:
    """Runs the engines of one of the two libraries on the first NVIDIA GPU."""

    unseen = "the states lie inside a compiled engine; verify its deferred bundle to see those of the graph"

    def __init__(self, library: Library) -> None:
        self.library = library
        self.name = library.name
        self.formats: tuple[str, ...] = (library.name,)
        self.modules: tuple[str, ...] = (library.module, MODULE)

    def availability(self) -> Availability:
        """Look for the GPU first: without one the libraries may crash."""
        device, found, cuda = find_device(), self.library.installed(), installed()
        lacks = [
            (device is None, "no NVIDIA GPU with a driver", "run it on a machine that has one"),
            (not found.available, found.detail, found.install),
            (not cuda, "cuda-python is not installed", INSTALL),
        ]
        if missing := [(detail, install) for lacking, detail, install in lacks if lacking]:
            return Availability(False, *("; ".join(part) for part in zip(*missing, strict=True)))
        assert device is not None
        return Availability(True, f"{found.detail} on {device.name}")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Check the lock, then load the engine."""
        del options  # threads are the CPU's
        facts = LockFacts.read(bundle.name, bundle.manifest.hardware)
        if not (found := self.availability()).available:
            raise NotAvailableError(f"runtime {self.name}: {found.detail}; {found.install}")
        device = find_device()
        assert device is not None
        trt = _imported(self.library)
        require_lock(bundle.name, facts, self.library, trt.__version__, device)
        return EngineSession(bundle, load_engine(bundle, facts, trt), Cuda())

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        """There is none: ``unseen`` says why."""
        del options
        raise NotAvailableError(f"bundle {bundle.name}: {self.unseen}")


def _imported(library: Library) -> Any:
    try:
        return importlib.import_module(library.module)
    except ModuleNotFoundError as error:
        raise NotAvailableError(f"{library.title} does not load ({one_line(error)}); {library.install}") from error
    except (ImportError, OSError) as error:  # what it is linked to
        raise NotAvailableError(
            f"{library.title} does not load ({one_line(error)}); update the driver, or install it again: "
            f"{library.install}"
        ) from error


def load_engine(bundle: Bundle, facts: LockFacts, trt: Any) -> Any:
    """Deserialise the engine; its lock must hold. One without weights gets them from the graph beside it.

    Raises BundleError where graph or engine are not those of the lock, NotAvailableError where the library does not
    start, as it does not with a driver that is too old for it.
    """
    artefact, log, graph = bundle.manifest.artefact, trt.Logger(trt.Logger.ERROR), bundle.folder / GRAPH
    if graph.exists():
        require_graph(bundle, facts)
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # pybind11's word for a null pointer
        raise NotAvailableError(
            f"{trt.__name__} {trt.__version__} does not start with driver {driver_of(find_device())}; update the driver"
        ) from error
    if facts.version_compat == "yes":  # such an engine carries the part of its library that runs it
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(read_engine(bundle.artefact_path))
    if engine is None:
        raise BundleError(f"bundle {bundle.name}: {trt.__name__} {trt.__version__} refuses {artefact}; build it again")
    if graph.exists() and not _refitted(trt, engine, graph, log):
        raise BundleError(f"bundle {bundle.name}: {artefact} does not take the weights of {GRAPH}; build it again")
    return engine


def _refitted(trt: Any, engine: Any, graph: Path, log: Any) -> bool:
    """Whether the engine took every weight of the graph."""
    refitter = trt.Refitter(engine, log)
    if not trt.OnnxParserRefitter(refitter, log).refit_from_file(str(graph)):
        return False
    return not refitter.get_missing_weights() and bool(refitter.refit_cuda_engine())


def driver_of(device: Device | None) -> str:
    """The driver's release and CUDA, for a message."""
    return "unknown" if device is None else f"{device.driver} (CUDA {device.cuda})"


def require_graph(bundle: Bundle, facts: LockFacts) -> None:
    """Raise BundleError if the graph beside the engine is not the one that it was built from."""
    digest = onnx_sha256(bundle.folder / GRAPH)
    if digest != facts.onnx_sha256:
        raise BundleError(
            f"bundle {bundle.name}: {GRAPH} has SHA-256 {digest}, its engine was built from {facts.onnx_sha256}; "
            "build it again"
        )


class EngineSession:
    """One engine, safe to share between threads.

    It has an execution context for every size of a list from the start, of a range for every size that was run.
    """

    def __init__(self, bundle: Bundle, engine: Any, cuda: Cuda) -> None:
        self._bundle, self._engine, self._cuda = bundle, engine, cuda
        self._lock = threading.Lock()
        self._contexts: dict[int, _Context] = {}
        _require_tensors(bundle, engine)
        for size in bundle.manifest.batch.sizes or ():
            self._context(size)

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All outputs of one batch, as numpy arrays."""
        count = check_inputs(self._bundle, inputs)
        with self._lock:
            return self._context(count).run(inputs)

    def buffers(self, count: int) -> Mapping[str, int]:
        """Addresses on the device, by name, of the inputs and outputs of a batch; ``run_on_device`` works on them."""
        self._bundle.manifest.batch.check(count, self._bundle.name)
        with self._lock:
            return dict(self._context(count).addresses)

    def run_on_device(self, count: int) -> None:
        """Run what the caller has put into ``buffers``; the outputs are there when this returns."""
        self._bundle.manifest.batch.check(count, self._bundle.name)
        with self._lock:
            self._context(count).run_on_device()

    def bind(self, inputs: Arrays) -> BoundEngine:
        """The session with its inputs and outputs on the device."""
        count = check_inputs(self._bundle, inputs)
        with self._lock:
            context = self._context(count)
            context.load(inputs)
        return BoundEngine(context, self._lock)

    def is_captured(self, count: int) -> bool:
        """Whether a batch runs as one CUDA graph; an engine that cannot be captured is enqueued call by call."""
        with self._lock:
            return self._context(count).captured

    def another(self) -> EngineSession:
        """A session of the same engine with contexts of its own, to run at the same time; weights are shared."""
        return EngineSession(self._bundle, self._engine, self._cuda)

    def _context(self, count: int) -> _Context:
        if count not in self._contexts:
            self._contexts[count] = _Context(self._bundle, self._engine, self._cuda, count)
        return self._contexts[count]


class BoundEngine:
    """An engine with the inputs of one batch on the device; a call copies nothing."""

    def __init__(self, context: _Context, lock: threading.Lock) -> None:
        self._context, self._lock = context, lock

    def __call__(self) -> None:
        with self._lock:
            self._context.run_on_device()

    def outputs(self) -> dict[str, Array]:
        """What the last run gave, copied."""
        with self._lock:
            return self._context.outputs()

    def device_seconds(self) -> float:
        """One run by the clock of the GPU: between two events on the stream that it runs on."""
        with self._lock:
            return self._context.device_seconds()


class _Context:
    """Buffers, stream, execution context and captured graph for one batch size."""

    def __init__(self, bundle: Bundle, engine: Any, cuda: Cuda, count: int) -> None:
        self._name, self._cuda, self._stream = bundle.name, cuda, cuda.stream()
        held: list[tuple[str, Any]] = [("cudaStreamDestroy", self._stream)]
        weakref.finalize(self, cuda.release, held)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise NotAvailableError(
                f"bundle {bundle.name}: no execution context, as when the GPU's memory is full; "
                "free some, or build with a smaller --batch"
            )
        manifest = bundle.manifest
        if engine.num_optimization_profiles > 1:
            place = profile_of(bundle, count)
            self._require(self._context.set_optimization_profile_async(place, int(self._stream)), "profile")
            cuda.wait(self._stream)
        self.addresses: dict[str, int] = {}
        self._outputs: dict[str, Array] = {}
        for spec in (*manifest.inputs, *manifest.outputs):
            shape = shape_for(spec, count)
            array = np.zeros(shape, spec.dtype)
            if spec in manifest.outputs:
                self._outputs[spec.name] = array
            else:
                self._require(self._context.set_input_shape(spec.name, shape), f"shape of {spec.name}")
            self.addresses[spec.name] = cuda.allocate(array.nbytes)
            held.append(("cudaFree", self.addresses[spec.name]))
            self._require(self._context.set_tensor_address(spec.name, self.addresses[spec.name]), spec.name)
            cuda.to_device(self.addresses[spec.name], array, self._stream)
            cuda.wait(self._stream)
        self._enqueue()  # what is allocated or compiled late happens now, outside the capture
        cuda.wait(self._stream)
        # In a range TensorRT-RTX replaces kernels by better ones while it runs, which a graph would not see.
        self._graph = cuda.capture(self._stream, self._execute) if manifest.batch.sizes else None
        if self._graph is not None:
            held.append(("cudaGraphExecDestroy", self._graph))

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Copy, run, copy back."""
        held = self._copy_in(inputs)
        self._launch()
        results = self.outputs()
        del held  # the arrays had to live until the stream was done with them
        return results

    def load(self, inputs: Arrays) -> None:
        """Copy the inputs to where they stay; the arrays may go when this returns."""
        held = self._copy_in(inputs)
        self._cuda.wait(self._stream)
        del held

    def _copy_in(self, inputs: Arrays) -> list[Array]:
        """Start copying; the arrays that are read meanwhile."""
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in held.items():
            self._cuda.to_device(self.addresses[name], array, self._stream)
        return list(held.values())

    def outputs(self) -> dict[str, Array]:
        """What the last run gave, copied."""
        results = {name: np.empty_like(array) for name, array in self._outputs.items()}
        for name, array in results.items():
            self._cuda.to_host(array, self.addresses[name], self._stream)
        self._cuda.wait(self._stream)
        return results

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run_on_device(self) -> None:
        self._launch()
        self._cuda.wait(self._stream)

    def device_seconds(self) -> float:
        return self._cuda.device_seconds(self._stream, self._launch)

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.call("cudaGraphLaunch", self._graph, self._stream)

    def _enqueue(self) -> None:
        self._require(self._execute(), "run")

    def _execute(self) -> bool:
        return bool(self._context.execute_async_v3(int(self._stream)))

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise MmdExportError(f"bundle {self._name}: the engine refuses its {what}")


def shape_for(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The shape of an input or output at a batch size."""
    return tuple(count if size == "batch" else int(size) for size in spec.shape)


def profile_of(bundle: Bundle, count: int) -> int:
    """The optimisation profile of a batch size: a list has one for each of its sizes, in order."""
    sizes = bundle.manifest.batch.sizes or ()
    if count not in sizes:
        raise UsageError(f"bundle {bundle.name}: batch {count} has no profile; built for {bundle.manifest.batch}")
    return sizes.index(count)


def _require_tensors(bundle: Bundle, engine: Any) -> None:
    """Raise BundleError unless inputs and outputs of the engine are those of the manifest."""
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    says = {spec.name for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs)}
    if found != says:
        artefact = bundle.manifest.artefact
        raise BundleError(
            f"bundle {bundle.name}: {artefact} has {sorted(found)}, the manifest says {sorted(says)}; build it again"
        )
