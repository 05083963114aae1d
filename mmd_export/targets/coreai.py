"""Target ``coreai``: an asset for Apple's Core AI, the systems of 2026 (27) and newer. Its tools are beta."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.runtime import Availability, uninstalled
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


class CoreAiTarget:
    """``model.aimodel``, a folder with functions ``main``, ``chain``, ``step_1`` ... ``step_K``; one static batch."""

    name = "coreai"
    format = "aimodel"
    artefact = "model.aimodel"
    modules: tuple[str, ...] = ("torch", "coreai.authoring", "coreai_torch")
    precisions: tuple[str, ...] = ("fp32",)
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled",)
    options: tuple[str, ...] = ()
    several_batches = False
    extra = "coreai"

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", "pip install 'mmd-export[tune,coreai]'")
        return Availability(True, f"coreai-torch {version('coreai-torch')}, beta")

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """Convert the whole sampler; one program gives the same bytes."""
        from mmd_export.torch_compilers.coreai import write_asset
        from mmd_export.torch_compilers.facts import program_facts

        counts = write_asset(program, options.output, folder / self.artefact)
        facts = {"nodes": sum(counts.values()), "op_counts": counts} | program_facts(program)
        return Compiled(facts, {name: version(name) for name in ("torch", "coreai-core", "coreai-torch")})


TARGET = CoreAiTarget()
