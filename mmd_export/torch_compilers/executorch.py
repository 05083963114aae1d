"""A sampler as an ExecuTorch program. One network call is lowered to XNNPACK, once; all K calls use its result.

Lowering the unrolled graph would trace every call some thirty times. Here the sampler is exported with its network
as one opaque operator, the captured call is lowered by itself, and its nodes are put in the operator's places:

``forward``: inputs of the manifest -> sample. ``chain``: the same -> (sample, state.1, ..., state.K).
``step_<k>``: inputs, state.1, ..., state.<k-1> -> state.<k>. Weights and delegates are stored once for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mmd_export.errors import NotAvailableError, one_line
from mmd_export.program import SamplerProgram
from mmd_export.specialise import quiet_copies
from mmd_export.torch_compilers.splice import splice
from mmd_export.unrolled_program import Calls, unroll, unroll_step

BACKEND = "XnnpackBackend"
NETWORK, DECODER = "network", "decoder"


@torch.library.custom_op("mmd_export::lowered", mutates_args=())
def lowered(inputs: list[Tensor], name: str, shape: list[int]) -> Tensor:  # noqa: ARG001 - splice reads the name
    """Stands for the lowered call ``name``; only its shape is ever computed."""
    return inputs[0].new_empty(shape)


@lowered.register_fake
def _(inputs: list[Tensor], name: str, shape: list[int]) -> Tensor:  # noqa: ARG001 - splice reads the name
    return inputs[0].new_empty(shape)


@dataclass(frozen=True)
class Lowered:
    """What ExecuTorch made of a sampler: the bytes, and the operators of ``forward``, delegate calls among them."""

    data: bytes
    op_counts: Mapping[str, int]


class Opaque(nn.Module):
    """``forward(x, k, **conditions)``: the network as one operator, with the constants of call ``k``."""

    def __init__(self, program: SamplerProgram) -> None:
        super().__init__()
        self.names = program.denoiser.names
        self.constant_count = program.denoiser.constant_count
        for k in range(program.plan.step_count):
            for i, value in enumerate(program.constants(k)):
                self.register_buffer(f"time_{k}_{i}", value.detach().clone())

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        """Raw output (B, C, H, W) of call ``k``."""
        constants = [self.get_buffer(f"time_{k}_{i}") for i in range(self.constant_count)]
        inputs = [x, *(conditions[name] for name in self.names), *constants]
        output: Tensor = lowered(inputs, NETWORK, list(x.shape))
        return output


class OpaqueDecoder(nn.Module):
    """``forward(latent)``: the decoder as one operator."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, latent: Tensor) -> Tensor:
        """Image (B, *shape)."""
        output: Tensor = lowered([latent], DECODER, [latent.shape[0], *self.shape])
        return output


def compile_sampler(program: SamplerProgram, output: str) -> Lowered:
    """All methods in one program; raises NotAvailableError that names an operator nobody can run."""
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge

    with quiet_copies():
        parts = {NETWORK: lower(program.step)}
        if program.decoder is not None:
            parts[DECODER] = lower(program.decoder.call)
        config = EdgeCompileConfig(_check_ir_validity=False)  # it would not know the opaque operator
        edge = to_edge(_methods(program, output), compile_config=config)
        whole = {name: splice(edge.exported_program(name), parts, lowered._opoverload) for name in sorted(edge.methods)}
        try:
            finished = EdgeProgramManager(whole, compile_config=config).to_executorch()
        except RuntimeError as error:
            raise NotAvailableError(f"target executorch: {one_line(error)}; use --target onnx") from error
    counts = _op_counts(finished.executorch_program, "forward")
    _require_kernels(counts)
    return Lowered(finished.buffer, counts)


def lower(call: ExportedProgram) -> ExportedProgram:
    """One call in ExecuTorch's edge dialect, with everything that XNNPACK takes in delegates."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    config = EdgeCompileConfig(_check_ir_validity=False)  # what has no kernel is named below, with the finished program
    edge = to_edge_transform_and_lower(call, partitioner=[XnnpackPartitioner()], compile_config=config)
    program: ExportedProgram = edge.exported_program()
    for node in program.graph.nodes:
        # Of a check of torch.linalg, in torch 2.13: the order of effects is a value that no method of ours passes on.
        if node.target is torch.ops.higher_order.with_effects:
            raise NotAvailableError(
                f"target executorch cannot run {node.args[1]}, which does more than it returns; use --target torch, or "
                "write the network without it"
            )
    return program


def _methods(program: SamplerProgram, output: str) -> dict[str, ExportedProgram]:
    """Every method of the artefact by name, its network calls opaque."""
    decoder = None if program.decoder is None else OpaqueDecoder(program.decoder.shape)
    calls = Calls(Opaque(program), decoder)
    steps = range(1, program.plan.step_count + 1)
    return {
        "forward": unroll(program, output, calls=calls),
        "chain": unroll(program, output, states=True, calls=calls),
        **{f"step_{step}": unroll_step(program, step, calls) for step in steps},
    }


def _op_counts(program: Any, method: str) -> dict[str, int]:
    """How often a method calls each operator and the delegate, by their names in the program."""
    (plan,) = (plan for plan in program.execution_plan if plan.name == method)
    counts: Counter[str] = Counter()
    for instruction in (instruction.instr_args for chain in plan.chains for instruction in chain.instructions):
        if hasattr(instruction, "delegate_index"):
            counts[plan.delegates[instruction.delegate_index].id] += 1
        elif hasattr(instruction, "op_index"):
            operator = plan.operators[instruction.op_index]
            counts[f"{operator.name}.{operator.overload}" if operator.overload else operator.name] += 1
    return dict(sorted(counts.items()))


def _require_kernels(counts: Mapping[str, int]) -> None:
    """Raise NotAvailableError for the first operator that ExecuTorch's own kernels lack."""
    from executorch.extension.pybindings.portable_lib import _get_operator_names

    known = set(_get_operator_names())
    for name in counts:
        if name != BACKEND and name not in known:
            raise NotAvailableError(
                f"target executorch has no kernel for {name}, which XNNPACK does not take either; use --target onnx"
            )
