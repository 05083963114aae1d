"""``.mlpackage`` artefacts in Core ML itself, on macOS."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs

INSTALL = "pip install 'mmd-export[coreml]'"
# The macOS of the same year as an iOS; https://apple.github.io/coremltools/docs-guides/source/target-conversion-formats.html
_MACOS_OF = {"iOS16": 13, "iOS17": 14, "iOS18": 15, "iOS26": 26}
_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ane": "CPU_AND_NE"}


class CoreMLRuntime:
    """Compiles a package and predicts with it, on the compute units that the manifest names."""

    name = "coreml"
    formats: tuple[str, ...] = ("mlpackage",)
    modules: tuple[str, ...] = ("coremltools",)
    unseen = "Core ML shows no states inside a compiled graph; runtime coreml-reference sees those of the same package"

    def availability(self) -> Availability:
        """Core ML is a part of macOS."""
        if sys.platform != "darwin":
            return Availability(False, f"Core ML is on macOS alone, this is {platform.system()}", "run it on a Mac")
        if uninstalled(self.modules):
            return Availability(False, "coremltools is not installed", INSTALL)
        version = importlib.metadata.version("coremltools")
        return Availability(True, f"Core ML of macOS {platform.mac_ver()[0]}, coremltools {version}")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:  # noqa: ARG002 - Core ML chooses its threads
        return _Session(bundle)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:  # noqa: ARG002 - as above
        raise NotAvailableError(f"bundle {bundle.name}: {self.unseen}")


class _Session:
    """One compiled package."""

    def __init__(self, bundle: Bundle) -> None:
        if not (found := RUNTIME.availability()).available:
            raise NotAvailableError(f"runtime coreml does not work here: {found.detail}; use coreml-reference")
        hardware = bundle.manifest.hardware or {}
        require_system(bundle.name, hardware.get("deployment_target", ""), platform.mac_ver()[0])
        coremltools: Any = importlib.import_module("coremltools")  # ships no types
        units = _UNITS[hardware.get("compute_units", "all")]
        self._bundle = bundle
        try:
            compiled = coremltools.models.utils.compile_model(str(bundle.artefact_path))
            self._model = coremltools.models.CompiledMLModel(compiled, getattr(coremltools.ComputeUnit, units))
        except RuntimeError as error:
            raise BundleError(
                f"bundle {bundle.name}: Core ML cannot load it: {one_line(error)}; rebuild the bundle"
            ) from error

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """The sample of one batch; integers go in as int32, the only ones that Core ML takes."""
        check_inputs(self._bundle, inputs)
        given = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in inputs.items()}
        try:
            sample = self._model.predict(given)["sample"]
        except RuntimeError as error:
            raise MmdExportError(
                f"bundle {self._bundle.name}: Core ML failed while running it: {one_line(error)}"
            ) from error
        return {"sample": self._as_declared(sample)}

    def _as_declared(self, sample: Any) -> Array:
        """An array as it is; a picture as uint8 (1, H, W, C)."""
        spec = self._bundle.manifest.spec("sample")
        if spec.dtype != "uint8":
            return np.asarray(sample, np.float32)
        picture = sample.convert("L" if spec.shape[-1] == 1 else "RGB")
        return np.asarray(picture, np.uint8).reshape([int(size) for size in spec.shape])


def require_system(bundle: str, target: str, macos: str) -> None:
    """Raise NotAvailableError if this macOS is older than the deployment target; Core ML judges unknown ones."""
    oldest = _MACOS_OF.get(target, int(target.removeprefix("macOS")) if target.startswith("macOS") else 0)
    release = int(macos.partition(".")[0] or oldest)
    if release == 16:  # what a Python built for older systems is told of macOS 26, python/cpython#135675
        release = 26
    if release < oldest:
        raise NotAvailableError(
            f"bundle {bundle}: built for {target}, which is macOS {oldest} or newer, here is macOS {macos}; "
            "build it again with an older --deployment-target"
        )


RUNTIME = CoreMLRuntime()
