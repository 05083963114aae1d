"""Target ``openvino``: OpenVINO IR, converted from the ONNX graph."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export import openvino_library
from mmd_export.folders import scratch_folder
from mmd_export.runtime import Availability, uninstalled
from mmd_export.targets import Compiled, CompileOptions
from mmd_export.targets.onnx import TARGET as ONNX

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


class OpenVinoTarget:
    """``model.xml`` and ``model.bin``: float32, or with weights in float16 (w16) and arithmetic in float32."""

    name = "openvino"
    format = "openvino"
    artefact = "model.xml"
    modules: tuple[str, ...] = (*ONNX.modules, "openvino")
    precisions: tuple[str, ...] = ("fp32", "w16")
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled",)
    options: tuple[str, ...] = ("device",)
    several_batches = True
    extra = "openvino"

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", "pip install 'mmd-export[tune,openvino]'")
        return openvino_library.availability()

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """The states keep their names in the file, so that the runtime can find them."""
        from mmd_export import openvino_ir

        states = [f"state.{k}" for k in range(1, program.plan.step_count + 1)]
        with scratch_folder() as scratch:
            plain = replace(options, precision="fp32", form="unrolled")
            onnx = ONNX.compile(program, scratch, plain)
            options.notify("converting the ONNX graph to OpenVINO IR")
            model = openvino_ir.convert(scratch / ONNX.artefact, states)
            if options.precision == "w16":
                openvino_ir.halve_weights(model)
            openvino_ir.save(model, folder / self.artefact)
        names = ("folded_values", "folded_bytes", "peak_activation_bytes", "device")
        kept = {name: onnx.graph[name] for name in names}
        return Compiled(
            openvino_ir.facts(folder / self.artefact) | kept,
            {**onnx.toolchain, "openvino": version("openvino")},
        )


TARGET = OpenVinoTarget()
