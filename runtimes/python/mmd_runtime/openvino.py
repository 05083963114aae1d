"""OpenVINO IR in OpenVINO on the CPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, UsageError
from mmd_export.openvino_library import availability, openvino
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session
from mmd_runtime.chunks import check_inputs
from mmd_runtime.cut_chain import Call, CutChain

# One run after the other, every operation in float32 whatever the processor would rather have. A thread bound to a core
# waits for that core while another is free: on a busy machine a bound run took several times as long.
_SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": "NO",
}


class OpenVinoRuntime:
    """Runs ``openvino`` bundles on the CPU, one request at a time, arithmetic in float32."""

    name = "openvino"
    formats: tuple[str, ...] = ("openvino",)
    modules: tuple[str, ...] = ("openvino",)
    unseen = ""

    def availability(self) -> Availability:
        """Whether the openvino package is installed."""
        return availability()

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load the artefact."""
        return _Session(bundle, _read(bundle), options)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        """Load the artefact; each state is found by its name."""
        return _ChainSession(bundle, _read(bundle), options)


class _Session:
    """One loaded artefact."""

    def __init__(self, bundle: Bundle, model: Any, options: RunOptions) -> None:
        found = {port.get_any_name(): port.get_element_type().to_dtype().name for port in model.inputs}
        says = {spec.name: spec.dtype for spec in bundle.manifest.inputs}
        if found != says:
            artefact = bundle.manifest.artefact
            raise BundleError(f"bundle {bundle.name}: {artefact} takes {found}, the manifest says {says}; rebuild it")
        self._bundle, self._call = bundle, _compiled(bundle, model, ["sample"], options)

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All outputs of one batch."""
        check_inputs(self._bundle, inputs)
        return self._call(inputs)


class _ChainSession(CutChain):
    """The shipped graph with its states as outputs, or the part between two states."""

    def __init__(self, bundle: Bundle, model: Any, options: RunOptions) -> None:
        super().__init__(bundle)
        self._model, self._options = model, options

    def _open_whole(self) -> Call:
        model = self._model.clone()
        states = [f"state.{k}" for k in range(1, self._steps + 1)]
        model.add_outputs([self._port(model, name) for name in states])
        return _compiled(self._bundle, model, ["sample", *states], self._options)

    def _open_step(self, step: int, known: Arrays) -> Call:
        """Each known value is put in the place of what computes it; what is still reached is the part."""
        library, model, goal = openvino(), self._model.clone(), f"state.{step}"
        end, ports = self._port(model, goal), _ports(model)
        for name in sorted(set(known) & set(ports)):
            port = ports[name]
            if goal in port.get_names() or port.get_node().get_type_name() == "Parameter":
                continue
            given = library.opset13.parameter(port.get_partial_shape(), port.get_element_type(), name)
            given.output(0).set_names({name})
            for user in port.get_target_inputs():
                user.replace_source_output(given.output(0))
        inputs = _parameters(end.get_node())
        for parameter in inputs:
            if (name := parameter.output(0).get_any_name()) not in known:
                where = f"bundle {self._bundle.name}: step {step}"
                raise UsageError(f"{where} reads '{name}', given: {sorted(known)}; add it")
        part = library.Model([library.opset13.result(end)], inputs, goal)
        return _compiled(self._bundle, part, [goal], self._options)

    def _port(self, model: Any, name: str) -> Any:
        """The value of that name."""
        try:
            return _ports(model)[name]
        except KeyError:
            raise BundleError(
                f"bundle {self._bundle.name}: the graph has no value '{name}', the golden file has; rebuild the bundle"
            ) from None


def _ports(model: Any) -> dict[str, Any]:
    """Every named value of the model; one value may have several names."""
    return {
        name: port
        for node in model.get_ordered_ops() if node.get_type_name() != "Result"
        for port in node.outputs()
        for name in port.get_names()
    }  # fmt: skip


def _parameters(end: Any) -> list[Any]:
    """The parameters that ``end`` reaches, by name."""
    pending, seen, found = [end], {end.get_name()}, []
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Parameter":
            found.append(node)
        for port in node.input_values():
            source = port.get_node()
            if source.get_name() not in seen:
                seen.add(source.get_name())
                pending.append(source)
    return sorted(found, key=lambda node: str(node.output(0).get_any_name()))


def _read(bundle: Bundle) -> Any:
    """The model as it is in the bundle."""
    library = openvino()
    path = bundle.artefact_path
    try:
        return library.Core().read_model(str(path), str(path.with_suffix(".bin")))
    except RuntimeError as error:
        raise _broken(bundle, error) from error


def _compiled(bundle: Bundle, model: Any, names: list[str], options: RunOptions) -> Call:
    """The model for this processor; outputs under those of their names that are asked for."""
    settings = _SETTINGS | ({"INFERENCE_NUM_THREADS": str(options.threads)} if options.threads else {})
    try:
        compiled = openvino().Core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
    except RuntimeError as error:
        raise _broken(bundle, error) from error
    taken = [port.get_any_name() for port in compiled.inputs]
    outputs = [
        (place, name) for place, port in enumerate(compiled.outputs) for name in names if name in port.get_names()
    ]
    alone = threading.Lock()  # the request holds inputs and outputs of one run

    def call(arrays: Arrays) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(arrays[name]) for name in taken}
        with alone:
            try:
                request.infer(feeds, share_inputs=True)
            except RuntimeError as error:
                where = f"bundle {bundle.name}: openvino failed while running it"
                raise MmdExportError(f"{where}: {_line(error)}") from error
            return {name: request.get_output_tensor(place).data.copy() for place, name in outputs}

    return call


def _broken(bundle: Bundle, error: Exception) -> BundleError:
    artefact = bundle.manifest.artefact
    return BundleError(f"bundle {bundle.name}: {artefact} cannot be loaded: {_line(error)}; rebuild the bundle")


def _line(error: Exception) -> str:
    """The message in one line; its first lines name places in openvino's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


RUNTIME = OpenVinoRuntime()
