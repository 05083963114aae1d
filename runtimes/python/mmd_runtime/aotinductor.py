"""AOTInductor packages in torch. A package is machine code: opening a bundle runs it, so open those that you trust."""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import zipfile
from functools import partial
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.environment import cpu_kind, why_no_cuda
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, one_line
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs

INSTALL = "pip install 'mmd-export[tune]'"


class AotInductorRuntime:
    """Runs ``pt2`` bundles on the device that they were compiled for."""

    name = "aotinductor"
    formats: tuple[str, ...] = ("pt2",)
    modules: tuple[str, ...] = ("torch",)
    unseen = "the states are inside one compiled library, which returns the sample alone"

    def availability(self) -> Availability:
        if uninstalled(self.modules):
            return Availability(False, "torch not installed", INSTALL)
        return Availability(True, f"torch {importlib.metadata.version('torch')}")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        return _Session(bundle, options)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:  # noqa: ARG002 - the protocol's
        raise NotAvailableError(f"bundle {bundle.name}: runtime {self.name}: {self.unseen}; build --target executorch")


class _Session:
    """One loaded library; inputs and output on the host, whatever the device."""

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        if not (found := RUNTIME.availability()).available:
            raise NotAvailableError(f"runtime aotinductor: {found.detail}; {found.install}")
        import torch

        from mmd_export.torch_device import use_threads

        self._use_threads = partial(use_threads, options.threads)
        self._use_threads()
        self._bundle = bundle
        self._names = [spec.name for spec in bundle.manifest.inputs]
        self._device = torch.device(_usable_device(bundle))
        self._library = _load(bundle)
        self._alone = threading.Lock()  # the switch of TF32 is that of all threads

    def run(self, inputs: Arrays) -> dict[str, Array]:
        import torch

        check_inputs(self._bundle, inputs)
        self._use_threads()
        given = [torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._device) for name in self._names]
        try:
            # float32 means float32: convolutions on a GPU would round to TF32
            with self._alone, torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                sample = self._library(*given)
        except RuntimeError as error:
            raise MmdExportError(
                f"bundle {self._bundle.name}: torch failed while running it: {one_line(error)}"
            ) from error
        return {"sample": sample.cpu().numpy()}


def _usable_device(bundle: Bundle) -> str:
    """The device of the package, if this machine can run its code; raises NotAvailableError with both values."""
    import torch

    from mmd_export.torch_device import BASE_ISA, cpu_vectors

    wants = bundle.manifest.hardware or {}
    has = {"system": platform.system(), "machine": platform.machine(), "vectors": cpu_vectors()}
    if "cpu" in wants:  # compiled for just this processor
        has["cpu"] = cpu_kind()
    if wants.get("device") == "cuda":
        if not torch.cuda.is_available():
            why = why_no_cuda(torch.__version__, torch.version.cuda)
            raise NotAvailableError(f"bundle {bundle.name} runs on CUDA: {why}, or rebuild with --device cpu")
        has["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    for name, value in has.items():
        wanted = wants.get(name)
        wider = name == "vectors" and (wanted in BASE_ISA.values() or (wanted, value) == ("AVX2", "AVX512"))
        if wanted != value and not wider:
            raise NotAvailableError(
                f"bundle {bundle.name} is code for {name} {wanted}, this machine has {value}; rebuild it here"
            )
    return wants.get("device", "cpu")


def _load(bundle: Bundle) -> Any:
    """The library, taken out of an archive that is complete."""
    from torch._inductor import aoti_load_package

    artefact = bundle.manifest.artefact
    try:
        with zipfile.ZipFile(bundle.artefact_path) as archive:
            archive.namelist()
        return aoti_load_package(str(bundle.artefact_path))
    except (zipfile.BadZipFile, RuntimeError, OSError) as error:
        raise BundleError(
            f"bundle {bundle.name}: {artefact} cannot be loaded: {one_line(error)}; rebuild the bundle"
        ) from error


RUNTIME = AotInductorRuntime()
