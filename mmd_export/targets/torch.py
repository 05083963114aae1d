"""Target ``torch``: the sampler compiled by AOTInductor to one ``.pt2`` package, for torch with or without Python."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.environment import why_no_cuda
from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability, uninstalled
from mmd_export.target_options import TargetOptions
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from mmd_export.program import SamplerProgram

INSTALL = "pip install 'mmd-export[tune]'"
COMPILER = f"apt-get install g++ (or set CXX), beside {INSTALL}"


class TorchTarget:
    """``model.pt2``: a shared library for one static batch and one device, weights inside; the same bytes twice.

    It is machine code for the vector width (or the GPU) of the building machine, which the manifest names.
    """

    name = "torch"
    format = "pt2"
    artefact = "model.pt2"
    modules: tuple[str, ...] = ("torch",)
    precisions: tuple[str, ...] = ("fp32",)
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled",)
    options: tuple[str, ...] = ("device",)
    several_batches = False
    extra = "tune"

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", INSTALL)
        from mmd_export.torch_compilers.compiler import find_compiler

        if (compiler := find_compiler()) is None:
            return Availability(False, "no C++ compiler (g++, or what CXX names)", COMPILER)
        only = ", no CUDA" if version("torch").endswith("+cpu") else ""
        return Availability(True, f"torch {version('torch')}{only}, {Path(compiler).name}")

    def require_options(self, precision: str, options: TargetOptions) -> None:  # noqa: ARG002 - ChecksOptions
        """Raise for a GPU that is not there."""
        usable_device(options.device)

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """Compile the whole sampler ahead of time."""
        from mmd_export.torch_compilers.facts import program_facts
        from mmd_export.torch_compilers.inductor import compile_package, hardware, moved
        from mmd_export.unrolled_program import unroll

        device = usable_device(options.target.device)
        exported = moved(unroll(program, options.output), device)
        require_torch_only(exported)
        options.notify("compiling with Inductor and the C++ compiler, a minute or more")
        calls = compile_package(exported, folder / self.artefact)
        facts = {"nodes": sum(calls.values()), "op_counts": calls} | program_facts(program)
        return Compiled(facts, {"torch": version("torch")}, hardware(device))


def usable_device(wanted: str | None) -> str:
    """``cpu``, where nothing else is wanted, or ``cuda``; raises NotAvailableError for a GPU that is not there."""
    import torch

    device = wanted or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        why = why_no_cuda(torch.__version__, torch.version.cuda)
        raise NotAvailableError(f"--device cuda builds on the GPU that it is for: {why}")
    return device


def require_torch_only(exported: ExportedProgram) -> None:
    """Raise NotAvailableError for an operator of another library: the package could not be loaded without it."""
    for node in exported.graph.nodes:
        namespace = getattr(node.target, "namespace", "aten")
        if node.op == "call_function" and namespace not in ("aten", "prims", "higher_order"):
            raise NotAvailableError(
                f"target torch has no {node.target}, an operator of {namespace}; write it with torch's own operators"
            )


TARGET = TorchTarget()
