"""Target ``executorch``: one ``.pte`` file for ExecuTorch, float32, its network in XNNPACK delegates."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.runtime import Availability, uninstalled
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


class ExecuTorchTarget:
    """``model.pte``: methods ``forward``, ``chain`` and ``step_1`` ... ``step_K``; one static batch; same bytes twice.

    ``graph.op_counts`` of the manifest names what is not delegated beside ``XnnpackBackend``, as ``forward`` calls it.
    """

    name = "executorch"
    format = "pte"
    artefact = "model.pte"
    modules: tuple[str, ...] = ("torch", "executorch.exir")
    precisions: tuple[str, ...] = ("fp32",)
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled",)
    options: tuple[str, ...] = ()
    several_batches = False
    extra = "executorch"

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", "pip install 'mmd-export[tune,executorch]'")
        return Availability(True, f"executorch {version('executorch')}, XNNPACK")

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """Lower one network call, write it with the arithmetic of the plan."""
        from mmd_export.torch_compilers.executorch import compile_sampler
        from mmd_export.torch_compilers.facts import program_facts

        made = compile_sampler(program, options.output)
        (folder / self.artefact).write_bytes(made.data)
        facts = {"nodes": sum(made.op_counts.values()), "op_counts": dict(made.op_counts)}
        return Compiled(facts | program_facts(program), {name: version(name) for name in ("torch", "executorch")})


TARGET = ExecuTorchTarget()
