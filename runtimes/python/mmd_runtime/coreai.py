"""Core AI assets in the runtime of coreai-core, on the CPU off Apple's systems: right or wrong, not how fast. Beta."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.metadata
import threading
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs, check_step

INSTALL = "pip install 'mmd-export[coreai]'"


class CoreAiRuntime:
    """Runs ``aimodel`` bundles; the states come from further functions of the asset."""

    name = "coreai"
    formats: tuple[str, ...] = ("aimodel",)
    modules: tuple[str, ...] = ("coreai.runtime", "coreai.authoring")
    unseen = ""

    def availability(self) -> Availability:
        if uninstalled(self.modules):
            return Availability(False, "coreai-core is not installed", INSTALL)
        return Availability(
            True, f"coreai-core {importlib.metadata.version('coreai-core')}, beta, a correctness oracle"
        )

    def open(self, bundle: Bundle, options: RunOptions) -> Session:  # noqa: ARG002 - it has no such choices
        return _Session(bundle)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:  # noqa: ARG002
        return _Session(bundle)


class _Loop:
    """One thread with an event loop: the library is asynchronous, its caller may have a loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self, stack: AsyncExitStack) -> None:
        """Leave what ``stack`` entered, then stop; waits for neither, so that any thread may call it."""

        async def leave() -> None:
            await stack.aclose()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(leave(), self._loop)


class _Session:
    """One loaded asset; the library compiles it into a temporary folder, which goes with the session."""

    def __init__(self, bundle: Bundle) -> None:
        if not (found := RUNTIME.availability()).available:
            raise NotAvailableError(f"runtime coreai: {found.detail}; {found.install}")
        self._bundle, self._steps = bundle, bundle.golden().steps
        self._inputs = [spec.name for spec in bundle.manifest.inputs]
        self._loop, stack = _Loop(), AsyncExitStack()
        weakref.finalize(self, self._loop.close, stack)
        self._model = self._load(stack)
        self._functions: dict[str, Any] = {}

    def run(self, inputs: Arrays) -> dict[str, Array]:
        check_inputs(self._bundle, inputs)
        return {"sample": self._call("main", inputs, self._inputs)["sample"]}

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        check_inputs(self._bundle, inputs)
        return {name.replace("_", "."): array for name, array in self._call("chain", inputs, self._inputs).items()}

    def run_step(self, step: int, known: Arrays) -> Array:
        names = check_step(self._bundle, step, known)
        return self._call(f"step_{step}", known, names)[f"state_{step}"]

    def _load(self, stack: AsyncExitStack) -> Any:
        _require_whole(self._bundle)
        authoring = importlib.import_module("coreai.authoring")
        try:
            asset = authoring.AIModelAsset.load(self._bundle.artefact_path)
            return self._loop.run(stack.enter_async_context(asset.executable()))
        except (RuntimeError, ValueError, OSError) as error:
            raise _broken(self._bundle, one_line(error)) from error

    def _call(self, name: str, arrays: Arrays, order: Sequence[str]) -> dict[str, Array]:
        """The outputs of a function by name, copied out of its memory."""
        runtime = importlib.import_module("coreai.runtime")
        try:
            if name not in self._functions:
                self._functions[name] = self._model.load_function(name)
            function, given = self._functions[name], {}
            for each in order:  # Core AI has no int64: the asset says int32 for labels
                dtype = function.desc.input_descriptor(each.replace(".", "_")).dtype
                given[each.replace(".", "_")] = runtime.NDArray(np.ascontiguousarray(arrays[each], dtype=dtype))
            found = self._loop.run(function(given))
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise MmdExportError(
                f"bundle {self._bundle.name}: coreai failed while running '{name}': {one_line(error)}"
            ) from error
        return {key: np.array(value.numpy()) for key, value in found.items()}


def _require_whole(bundle: Bundle) -> None:
    """Raise BundleError unless the program has the hash beside it: the library would abort the whole process."""
    try:
        found = hashlib.sha256((bundle.artefact_path / "main.mlirb").read_bytes()).digest()
        says = (bundle.artefact_path / "main.hash").read_bytes()
    except OSError as error:
        raise _broken(bundle, one_line(error)) from error
    if found != says:
        raise _broken(bundle, f"its program has SHA-256 {found.hex()}, main.hash says {says.hex()}")


def _broken(bundle: Bundle, reason: str) -> BundleError:
    artefact = bundle.manifest.artefact
    return BundleError(f"bundle {bundle.name}: {artefact} cannot be loaded: {reason}; rebuild the bundle")


RUNTIME = CoreAiRuntime()
