"""ONNX artefacts in onnxruntime on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Any

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session
from mmd_runtime.chunks import check_array, check_inputs
from mmd_runtime.onnx_cut import cut_step, with_states
from mmd_runtime.onnx_loop import LoopStep, body_model, find_loop, split_states, with_loop_states

INSTALL = "pip install 'mmd-export[onnx]'"
PROVIDERS = ["CPUExecutionProvider"]
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
_STEP_SESSIONS_BYTES = 2**28


class OnnxRuntime:
    """Runs ``onnx`` bundles with the CPU execution provider, nodes in order."""

    name = "onnxruntime"
    formats: tuple[str, ...] = ("onnx",)
    unseen = ""

    def availability(self) -> Availability:
        """Whether the onnxruntime package is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", INSTALL)
        try:
            return Availability(True, f"onnxruntime {importlib.metadata.version('onnxruntime')}, CPU")
        except importlib.metadata.PackageNotFoundError:
            return Availability(True, "onnxruntime, CPU")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load the artefact."""
        return _Session(bundle, _inference_session(bundle, bundle.artefact_path, options))

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        """Load the artefact with every ``state.<k>`` as an output; needs the ``onnx`` package too."""
        _require_onnx(bundle)
        return chain_session(bundle, options, _load_model(bundle))


def chain_session(bundle: Bundle, options: RunOptions, model: Any) -> ChainSession:
    """``model``, the bundle's ONNX protobuf or one that stands for it, opened so that its states can be seen."""
    kind = _ChainSession if find_loop(model) is None else _LoopChainSession
    return kind(bundle, options, model)


class _Session:
    """One loaded artefact."""

    def __init__(self, bundle: Bundle, session: Any) -> None:
        self._bundle, self._session = bundle, session
        found = {value.name: _DTYPES.get(value.type, value.type) for value in session.get_inputs()}
        says = {spec.name: spec.dtype for spec in bundle.manifest.inputs}
        if found != says:
            artefact = bundle.manifest.artefact
            raise BundleError(f"bundle {bundle.name}: {artefact} takes {found}, the manifest says {says}; rebuild it")

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All outputs of one batch."""
        check_inputs(self._bundle, inputs)
        return _run(self._bundle, self._session, inputs)


class _ChainSession:
    """The shipped graph with its states as outputs, or cut between two states."""

    def __init__(self, bundle: Bundle, options: RunOptions, model: Any) -> None:
        self._bundle, self._options, self._model = bundle, options, model
        self._steps = bundle.golden().steps
        self._whole: Any = None
        self._cuts: OrderedDict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], Any] = OrderedDict()

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        """``state.1`` ... ``state.K`` and the outputs, from one pass."""
        check_inputs(self._bundle, inputs)
        if self._whole is None:
            self._whole = _inference_session(self._bundle, self._opened().SerializeToString(), self._options)
        return _run(self._bundle, self._whole, inputs)

    def _opened(self) -> Any:
        """The model with its states as outputs."""
        return with_states(self._model, self._bundle, self._steps)

    def run_step(self, step: int, known: Arrays) -> Array:
        """``state.<step>`` from ``state.<step - 1>`` (``noise`` for step 1) and what else that step reads."""
        if not 1 <= step <= self._steps:
            raise UsageError(f"bundle {self._bundle.name}: step {step} is asked for; it has steps 1 to {self._steps}")
        before = "noise" if step == 1 else f"state.{step - 1}"
        if before not in known:
            raise UsageError(f"bundle {self._bundle.name}: step {step} starts from '{before}', given: {sorted(known)}")
        for name, array in known.items():
            self._check_known(name, array)
        self._whole = None  # its copy of the weights; made again if it is asked for
        return self._forced(step, known)

    def _forced(self, step: int, known: Arrays) -> Array:
        session = self._cut(step, known)
        feeds = {value.name: known[value.name] for value in session.get_inputs()}
        return _run(self._bundle, session, feeds)[f"state.{step}"]

    def _check_known(self, name: str, array: Array) -> None:
        specs = {spec.name: spec for spec in self._bundle.manifest.inputs}
        if name.startswith("state."):
            specs[name] = specs["noise"].model_copy(update={"name": name})
        if name in specs:
            check_array(self._bundle, array, specs[name])

    def _cut(self, step: int, known: Arrays) -> Any:
        """The session of one step; so many are kept as have their weights in 1 GiB."""
        key = step, tuple(sorted((name, tuple(array.shape)) for name, array in known.items()))
        if key not in self._cuts:
            keep = max(1, _STEP_SESSIONS_BYTES // max(1, self._bundle.manifest.graph.unique_weight_bytes))
            while len(self._cuts) >= keep:
                self._cuts.popitem(last=False)
            part = cut_step(self._model, self._bundle, step, known)
            self._cuts[key] = _inference_session(self._bundle, part.SerializeToString(), self._options)
        self._cuts.move_to_end(key)
        return self._cuts[key]


class _LoopChainSession(_ChainSession):
    """The same for a graph in the form of a loop: the body alone serves every step."""

    def __init__(self, bundle: Bundle, options: RunOptions, model: Any) -> None:
        super().__init__(bundle, options, model)
        self._body: LoopStep | None = None

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        return split_states(super().run_chain(inputs), self._steps)

    def _opened(self) -> Any:
        return with_loop_states(self._model, self._bundle, self._steps)

    def _forced(self, step: int, known: Arrays) -> Array:
        for k in range(1, step):
            if f"state.{k}" not in known:
                name = self._bundle.name
                raise UsageError(f"bundle {name}: step {step} reads 'state.{k}', given: {sorted(known)}; add it")
        if self._body is None:
            body = body_model(self._model)
            session = _inference_session(self._bundle, body.SerializeToString(), self._options)
            scale = float(self._bundle.manifest.plan["initial_scale"])
            self._body = LoopStep(body, scale, lambda feeds: list(_run(self._bundle, session, feeds).values()))
        return self._body.state_after(step, known)


def _onnxruntime() -> Any:
    """The package, imported when it is first needed; it ships no types."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise NotAvailableError(f"onnxruntime is not available here ({error}); {INSTALL}") from error


def _require_onnx(bundle: Bundle) -> None:
    if importlib.util.find_spec("onnx") is None:
        raise NotAvailableError(
            f"bundle {bundle.name}: looking inside its chain needs the onnx package, which is not installed; {INSTALL}"
        )


def _load_model(bundle: Bundle) -> Any:
    """The ONNX protobuf without its external weights."""
    import onnx

    decode_error: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError  # no types
    try:
        return onnx.load(bundle.artefact_path, load_external_data=False)
    except (decode_error, OSError) as error:
        raise _broken(bundle, error) from error


def _inference_session(bundle: Bundle, model: Path | bytes, options: RunOptions) -> Any:
    """A session that runs nodes one after the other; external weights are read from the bundle's folder."""
    ort = _onnxruntime()
    if hasattr(ort, "disable_telemetry_events"):
        ort.disable_telemetry_events()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 3
    if isinstance(model, bytes):
        folder = str(bundle.folder.resolve())
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    failures = _failures()
    try:
        return ort.InferenceSession(model if isinstance(model, bytes) else str(model), settings, providers=PROVIDERS)
    except failures as error:
        if type(error).__name__ == "NotImplemented":
            version = ort.__version__
            raise NotAvailableError(
                f"bundle {bundle.name}: onnxruntime {version} cannot run it: {_line(error)}; update onnxruntime"
            ) from error
        raise _broken(bundle, error) from error


def _run(bundle: Bundle, session: Any, feeds: Arrays) -> dict[str, Array]:
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except _failures() as error:
        raise MmdExportError(f"bundle {bundle.name}: onnxruntime failed while running it: {_line(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which share no base class of their own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return tuple(kinds)


def _broken(bundle: Bundle, error: Exception) -> BundleError:
    artefact = bundle.manifest.artefact
    return BundleError(f"bundle {bundle.name}: {artefact} cannot be loaded: {_line(error)}; rebuild the bundle")


def _line(error: Exception) -> str:
    """The message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


RUNTIME = OnnxRuntime()
