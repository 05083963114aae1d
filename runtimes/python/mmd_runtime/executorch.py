"""ExecuTorch artefacts in its Python binding. That binding loads libtorch, so this runtime needs torch installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs, check_step

INSTALL = "pip install 'mmd-export[tune,executorch]'"


class ExecuTorchRuntime:
    """Runs ``pte`` bundles; the states come from further methods of the artefact, which share its delegates."""

    name = "executorch"
    formats: tuple[str, ...] = ("pte",)
    modules: tuple[str, ...] = ("torch", "executorch.runtime")
    unseen = ""

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", INSTALL)
        return Availability(True, f"executorch {importlib.metadata.version('executorch')}, CPU")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        return _Session(bundle, options)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        return _Session(bundle, options)


class _Session:
    """One loaded program; its methods are prepared when they are first called."""

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        self._bundle, self._steps = bundle, bundle.golden().steps
        self._inputs = [spec.name for spec in bundle.manifest.inputs]
        self._program = _load(bundle, options)
        self._method("forward", len(self._inputs))

    def run(self, inputs: Arrays) -> dict[str, Array]:
        check_inputs(self._bundle, inputs)
        return {"sample": self._call("forward", inputs, self._inputs)[0]}

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        check_inputs(self._bundle, inputs)
        names = ["sample", *(f"state.{k}" for k in range(1, self._steps + 1))]
        return dict(zip(names, self._call("chain", inputs, self._inputs), strict=True))

    def run_step(self, step: int, known: Arrays) -> Array:
        names = check_step(self._bundle, step, known)
        return self._call(f"step_{step}", known, names)[0]

    def _method(self, name: str, inputs: int) -> Any:
        """The method, after its number of inputs was compared with the manifest's."""
        where = f"bundle {self._bundle.name}: {self._bundle.manifest.artefact}"
        if name not in self._program.method_names:
            raise BundleError(f"{where} has no method '{name}'; rebuild the bundle")
        try:
            method = self._program.load_method(name)
        except RuntimeError as error:
            raise MmdExportError(
                f"{where}: executorch {importlib.metadata.version('executorch')} cannot run method '{name}': "
                f"{one_line(error)}; update executorch"
            ) from error
        if method.metadata.num_inputs() != inputs:
            found = method.metadata.num_inputs()
            raise BundleError(f"{where}: method '{name}' takes {found} inputs, the manifest says {inputs}; rebuild it")
        return method

    def _call(self, name: str, arrays: Arrays, order: Sequence[str]) -> list[Array]:
        import torch

        method = self._method(name, len(order))
        given = [torch.from_numpy(np.ascontiguousarray(arrays[each])) for each in order]
        try:
            return [output.numpy() for output in method.execute(given)]
        except RuntimeError as error:
            raise MmdExportError(
                f"bundle {self._bundle.name}: executorch failed while running '{name}': {one_line(error)}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch 1.5 imports torchao, which warns of its own CUDA libraries. Delete when it does not."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _load(bundle: Bundle, options: RunOptions) -> Any:
    """The program, its tables checked; the artefact stays on disk until a method needs it."""
    if not (found := RUNTIME.availability()).available:
        raise NotAvailableError(f"runtime executorch: {found.detail}; {found.install}")
    with _quiet():
        binding = importlib.import_module("executorch.extension.pybindings.portable_lib")
        runtime = importlib.import_module("executorch.runtime")
    if options.threads:
        binding._unsafe_reset_threadpool(options.threads)
    try:
        return runtime.Runtime.get().load_program(bundle.artefact_path)
    except RuntimeError as error:
        artefact = bundle.manifest.artefact
        raise BundleError(
            f"bundle {bundle.name}: {artefact} cannot be loaded: {one_line(error)}; rebuild the bundle"
        ) from error


RUNTIME = ExecuTorchRuntime()
