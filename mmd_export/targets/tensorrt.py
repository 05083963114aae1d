"""Target ``tensorrt``: the typed ONNX graph compiled to an engine for the GPU at hand, TensorRT 10 and 11."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError
from mmd_export.folders import scratch_folder
from mmd_export.runtime import Availability, uninstalled
from mmd_export.target_options import TargetOptions
from mmd_export.targets import Compiled, CompileOptions, onnx
from mmd_export.trt.device import find_device
from mmd_export.trt.library import TENSORRT, Library

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram
    from mmd_export.trt.lock import LockFacts


class EngineTarget:
    """ONNX to an engine of either library; precision is written in the graph, the network is strongly typed.

    The same graph, release and options give the same bytes in TensorRT-RTX. TensorRT chooses kernels by their measured
    times, so its bytes repeat only as far as its timing cache does; the cache of finished engines gives the same bytes.
    """

    artefact = "model.plan"
    precisions: tuple[str, ...] = onnx.TARGET.precisions
    outputs: tuple[str, ...] = onnx.TARGET.outputs
    forms: tuple[str, ...] = onnx.TARGET.forms
    several_batches = True

    def __init__(self, library: Library) -> None:
        self.library = library
        self.name = self.format = self.extra = library.name
        self.modules: tuple[str, ...] = (*onnx.TARGET.modules, library.module)
        self.options: tuple[str, ...] = (*library.options, "calibration")

    def availability(self) -> Availability:
        graph, found = onnx.TARGET.availability(), self.compiler()
        if found.available and not graph.available:
            return graph
        if found.install == self.library.install:  # what compiles a graph; one is made here first
            return replace(found, install=f"pip install 'mmd-export[tune,{self.extra}]'")
        return found

    def compiler(self) -> Availability:
        """Whether the library is whole, and there is a GPU if it needs one."""
        found = self.library.installed()
        if found.available and self.library.needs_gpu and find_device() is None:
            return Availability(False, f"{found.detail}, but no NVIDIA GPU with a driver is here", self.library.install)
        if found.available and uninstalled(["onnx_ir"]):
            return Availability(False, "onnx_ir is not installed", self.library.install)
        return found

    def require_options(self, precision: str, options: TargetOptions) -> None:
        """Raise where a GPU is needed and missing, those that are named lack the precision, or no cache can be."""
        from mmd_export.trt.engine import make_cache, require_capable, require_gpu_where_needed

        require_gpu_where_needed(self.library, options, find_device())
        require_capable(precision, options)
        if options.compress and find_spec("_lzma") is None:
            raise NotAvailableError(
                "--compress needs the module lzma, which this Python is built without; leave it out"
            )
        if options.cache is not None:
            make_cache(options.cache)

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """``model.plan``, packed if asked for, and ``model.onnx`` beside an engine without weights."""
        with scratch_folder() as scratch:
            graph = onnx.TARGET.compile(program, scratch, options)
            model = scratch / onnx.TARGET.artefact
            facts = self.compile_onnx(model, folder, options)
        return Compiled(graph.graph, {**graph.toolchain, facts.library: facts.version}, facts.to_dict())

    def require_buildable(self, model: Path) -> None:
        """The lint that a build begins with."""
        from mmd_export.trt.lint import require_buildable

        require_buildable(model, self.library.title)

    def compile_onnx(self, model: Path, folder: Path, options: CompileOptions) -> LockFacts:
        """The engine of a graph, and what it is locked to."""
        from mmd_export.trt.engine import Request, build_engine, onnx_files
        from mmd_export.trt.packing import pack
        from mmd_export.trt.rewrite import rewritten

        with scratch_folder() as scratch:
            if self.library.rewrite and options.target.strip_weights:  # the weights come from the graph that was built
                self.require_buildable(model)
                model = rewritten(model.absolute(), scratch)
            request = Request(model, options.batch, options.target, options.precision, options.log, options.notify)
            facts = build_engine(self.library, request, folder / self.artefact)
            if options.target.compress:
                options.notify("packing the engine")
                pack(folder / self.artefact, folder / options.target.stored(self.artefact))
            if options.target.strip_weights:
                for path in onnx_files(model):
                    shutil.copyfile(path, folder / path.name)
        return facts


TARGET = EngineTarget(TENSORRT)
