"""ONNX artefacts in onnxruntime, on the CPU or with one of its execution providers."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, Placement, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs
from mmd_runtime.cut_chain import Call, CutChain
from mmd_runtime.onnx_bound import BoundRun
from mmd_runtime.onnx_cut import cut_step, with_states
from mmd_runtime.onnx_loop import LoopStep, body_model, find_loop, split_states, with_loop_states
from mmd_runtime.onnx_providers import (
    CPU,
    PROVIDERS,
    Provider,
    ProviderMissingError,
    availability,
    driver_move,
    failures,
    get_provider,
    open_session,
    placement,
    record_placement,
)

INSTALL = "pip install 'mmd-export[onnx]'"
_MOVES_FLOAT8 = (1, 32)  # before, also through Transpose, which opset 20 has for other types only
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}


class OnnxRuntime:
    """Runs ``onnx`` bundles, nodes in order: on the CPU, or with the provider that was asked for, never without it."""

    formats: tuple[str, ...] = ("onnx",)
    modules: tuple[str, ...] = ("onnxruntime",)
    unseen = ""
    providers: tuple[str, ...] = tuple(PROVIDERS)

    def __init__(self, provider: Provider | None = None) -> None:
        self.provider = provider
        self.name = "onnxruntime" if provider is None else f"onnxruntime:{provider.name}"
        self.records_graphs = bool((provider or CPU).graph_option)

    def on(self, provider: str) -> OnnxRuntime:
        """The runtime with that provider; its sessions tell where their nodes run."""
        return OnnxRuntime(get_provider(provider))

    def availability(self) -> Availability:
        """Whether the onnxruntime package is installed, and the provider works: a trial needs the package imported."""
        if uninstalled(self.modules):
            return Availability(False, "onnxruntime is not installed", INSTALL)
        if self.provider is not None:
            try:
                return availability(_onnxruntime(), self.provider)
            except NotAvailableError as error:  # installed, but it does not import
                again = "pip install --force-reinstall --no-deps onnxruntime"
                return Availability(False, f"onnxruntime does not import: {error.__cause__}", again)
        try:
            return Availability(True, f"onnxruntime {importlib.metadata.version('onnxruntime')}, CPU")
        except importlib.metadata.PackageNotFoundError:
            return Availability(True, "onnxruntime, CPU")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load the artefact."""
        session = _inference_session(bundle, bundle.artefact_path, options, self.provider)
        if self.provider is None:
            return _Session(bundle, session)
        place = placement(self.provider, session)
        if not place.taken and not place.unknown:
            raise ProviderMissingError(self.provider, f"it takes none of the nodes of bundle {bundle.name}")
        kind = _GraphSession if options.cuda_graph else _PlacedSession
        return kind(bundle, session, self.provider, place)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        """Load the artefact with every ``state.<k>`` as an output; needs the ``onnx`` package too."""
        _require_onnx(bundle)
        return chain_session(bundle, options, _load_model(bundle), self.provider)


def chain_session(bundle: Bundle, options: RunOptions, model: Any, provider: Provider | None = None) -> ChainSession:
    """``model``, the bundle's ONNX protobuf or one that stands for it, opened so that its states can be seen."""
    kind = _ChainSession if find_loop(model) is None else _LoopChainSession
    return kind(bundle, options, model, provider)


class _Session:
    """One loaded artefact."""

    def __init__(self, bundle: Bundle, session: Any, provider: Provider = CPU) -> None:
        self._bundle, self._session, self._provider = bundle, session, provider
        found = {value.name: _DTYPES.get(value.type, value.type) for value in session.get_inputs()}
        says = {spec.name: spec.dtype for spec in bundle.manifest.inputs}
        if found != says:
            artefact = bundle.manifest.artefact
            raise BundleError(f"bundle {bundle.name}: {artefact} takes {found}, the manifest says {says}; rebuild it")

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All outputs of one batch."""
        check_inputs(self._bundle, inputs)
        return _run(self._bundle, self._session, inputs)

    def bind(self, inputs: Arrays) -> BoundRun:
        """The session with its inputs and outputs on the device."""
        count = check_inputs(self._bundle, inputs)
        return BoundRun(self._bundle, self._session, self._provider.device, inputs, count)


class _PlacedSession(_Session):
    """The same with a provider that was asked for."""

    def __init__(self, bundle: Bundle, session: Any, provider: Provider, place: Placement) -> None:
        super().__init__(bundle, session, provider)
        self.placement = place


class _GraphSession(_PlacedSession):
    """The same with its run recorded as a CUDA graph, which reads and writes where the first run did."""

    def __init__(self, bundle: Bundle, session: Any, provider: Provider, place: Placement) -> None:
        super().__init__(bundle, session, provider, place)
        self._alone = threading.Lock()
        self._bound: BoundRun | None = None

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All outputs of one batch."""
        check_inputs(self._bundle, inputs)
        with self._alone:
            if self._bound is None:
                self._bound = self.bind(inputs)
            else:
                self._bound.update(inputs)
            self._bound()
            return self._bound.outputs()


class _ChainSession(CutChain):
    """The shipped graph with its states as outputs, or cut between two states."""

    def __init__(self, bundle: Bundle, options: RunOptions, model: Any, provider: Provider | None) -> None:
        super().__init__(bundle)
        self._options, self._model, self._provider = replace(options, cuda_graph=False), model, provider

    def _open_whole(self) -> Call:
        return self._call(with_states(self._model, self._bundle, self._steps))

    def _open_step(self, step: int, known: Arrays) -> Call:
        return self._call(cut_step(self._model, self._bundle, step, known))

    def _call(self, model: Any) -> Call:
        """A session of ``model`` that takes what it needs."""
        session = _inference_session(self._bundle, model.SerializeToString(), self._options, self._provider)
        names = [value.name for value in session.get_inputs()]
        return lambda arrays: _run(self._bundle, session, {name: arrays[name] for name in names})


class _LoopChainSession(_ChainSession):
    """The same for a graph in the form of a loop: the body alone serves every step."""

    def __init__(self, bundle: Bundle, options: RunOptions, model: Any, provider: Provider | None) -> None:
        super().__init__(bundle, options, model, provider)
        self._body: LoopStep | None = None

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        return split_states(super().run_chain(inputs), self._steps)

    def _open_whole(self) -> Call:
        return self._call(with_loop_states(self._model, self._bundle, self._steps))

    def _forced(self, step: int, known: Arrays) -> Array:
        for k in range(1, step):
            if f"state.{k}" not in known:
                name = self._bundle.name
                raise UsageError(f"bundle {name}: step {step} reads 'state.{k}', given: {sorted(known)}; add it")
        if self._body is None:
            body = body_model(self._model)
            call = self._call(body)
            scale = float(self._bundle.manifest.plan["initial_scale"])
            self._body = LoopStep(body, scale, lambda feeds: list(call(feeds).values()))
        return self._body.state_after(step, known)


def _onnxruntime() -> Any:
    """The package, imported when it is first needed; it ships no types."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise NotAvailableError(f"onnxruntime is not available here ({error}); {INSTALL}") from error


def _require_onnx(bundle: Bundle) -> None:
    if uninstalled(["onnx"]):
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


def _inference_session(bundle: Bundle, model: Path | bytes, options: RunOptions, provider: Provider | None) -> Any:
    """A session that runs nodes one after the other; external weights are read from the bundle's folder."""
    ort = _onnxruntime()
    if options.cuda_graph:
        _require_graph(bundle, provider or CPU)
    settings = _settings(ort, options)
    if isinstance(model, bytes):
        folder = str(bundle.folder.resolve())
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if provider is not None:
        record_placement(settings)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return open_session(ort, provider or CPU, source, settings, graph=options.cuda_graph)
    except failures() as error:
        if type(error).__name__ == "NotImplemented":
            version = ort.__version__
            raise NotAvailableError(
                f"bundle {bundle.name}: onnxruntime {version} cannot run it: {one_line(error)}; "
                "choose a provider that has the operator in this precision, or build another --precision"
            ) from error
        if provider is not None and driver_move(one_line(error)):
            raise ProviderMissingError(provider, one_line(error)) from error
        raise _broken(bundle, error) from error


def _settings(ort: Any, options: RunOptions) -> Any:
    if hasattr(ort, "disable_telemetry_events"):
        ort.disable_telemetry_events()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 3
    return settings


def _require_graph(bundle: Bundle, provider: Provider) -> None:
    """Raise NotAvailableError unless a run can be recorded: a GPU's provider, and one batch size."""
    if not provider.graph_option:
        able = ", ".join(known.name for known in PROVIDERS.values() if known.graph_option)
        raise NotAvailableError(f"onnxruntime's provider {provider.name} records no CUDA graphs; {able} do")
    if not bundle.manifest.batch.is_static:
        batch = bundle.manifest.batch
        raise NotAvailableError(
            f"bundle {bundle.name} takes batches {batch}, a CUDA graph one size; build with --batch {batch.smallest}"
        )


def _run(bundle: Bundle, session: Any, feeds: Arrays) -> dict[str, Array]:
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except failures() as error:
        raise MmdExportError(f"bundle {bundle.name}: onnxruntime failed while running it: {one_line(error)}") from error


def _broken(bundle: Bundle, error: Exception) -> MmdExportError:
    artefact = bundle.manifest.artefact
    version = _onnxruntime().__version__
    old = tuple(int(part) for part in version.split(".")[:2]) < _MOVES_FLOAT8
    if old and "float8" in str(error) and "Transpose" in str(error):
        return NotAvailableError(
            f"bundle {bundle.name}: {artefact} cannot be loaded: onnxruntime is {version}, fp8 needs 1.32 or newer; "
            "upgrade the package that it comes from"
        )
    return BundleError(f"bundle {bundle.name}: {artefact} cannot be loaded: {one_line(error)}; rebuild the bundle")


RUNTIME = OnnxRuntime()
