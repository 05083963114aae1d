"""A program as float32 ONNX: the call with the constants of its K uses, and the graph around it. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from mmd_export.onnx_compose import GraphSpec, compose
from mmd_export.onnx_translate import translate
from mmd_export.precision.trajectory import Calls

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


def exact_calls(program: SamplerProgram) -> Calls:
    """The captured call as it is."""
    constants = [
        [value.detach().cpu().numpy() for value in program.constants(k)] for k in range(program.plan.step_count)
    ]
    model = translate(program.step) if program.translated is None else program.translated
    return Calls(model, constants, program.plan, program.shape, program.batch, program.conditions)


def graph_spec(program: SamplerProgram, output: str) -> GraphSpec:
    """The outside of its graph; ``output``: float32 or uint8."""
    decoder = None if program.decoder is None else (translate(program.decoder.call), program.decoder.shape)
    return GraphSpec(program.shape, program.batch, program.conditions, output, decoder)


def unrolled(calls: Calls, spec: GraphSpec) -> ir.Model:
    """All K calls as one graph; ``calls`` stays as it was."""
    return compose(calls.model.clone(), calls.plan, calls.constants, spec)
