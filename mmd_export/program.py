"""The exported program: one specialised network call captured by torch.export, checked to be static."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmd_export.conditions import Condition
from mmd_export.decoder import LatentDecoder
from mmd_export.denoiser import typical_timestep
from mmd_export.lift import lift
from mmd_export.plan import StepPlan
from mmd_export.specialise import SpecialisedDenoiser, any_batch, check_static, export_call, specialise

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class DecoderProgram:
    """The captured decoder: latent (B, C, H, W) to image (B, *shape), not clamped; ``precision`` is its own."""

    call: ExportedProgram
    shape: tuple[int, int, int]
    precision: str

    def runner(self) -> nn.Module:
        """The captured decoder as a module, for parity."""
        return self.call.module(check_guards=False)


@dataclass(frozen=True)
class SamplerProgram:
    """Everything a target compiles: the plan, one captured call, and the constants of each of its K uses.

    ``step`` maps (x, *conditions, *constants) to the raw output. ``batch`` is the static batch, or None if dynamic.
    ``decoder`` turns the last state into the image, if that is a latent and the graph shall end in an image.
    ``translated`` is ``step`` as ONNX for whoever compiles it more than once, as translating takes seconds; read only.
    """

    plan: StepPlan
    step: ExportedProgram
    denoiser: SpecialisedDenoiser
    shape: tuple[int, int, int]
    batch: int | None
    conditions: tuple[Condition, ...] = ()
    decoder: DecoderProgram | None = None
    translated: ir.Model | None = None

    def constants(self, k: int) -> list[Tensor]:
        """The folded time path of call ``k``."""
        return self.denoiser.constants(k)

    def runner(self) -> nn.Module:
        """The captured call behind the signature of a step denoiser, for parity."""
        return ExportedDenoiser(self)


class ExportedDenoiser(nn.Module):
    """``forward(x, k, **conditions)`` that runs the exported program."""

    def __init__(self, program: SamplerProgram) -> None:
        super().__init__()
        self.call = program.step.module(check_guards=False)
        self.source = program.denoiser

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        """Raw output (B, C, H, W) of call ``k``."""
        given = (conditions[name] for name in self.source.names)
        output: Tensor = self.call(x, *given, *self.source.constants(k))
        return output


def export_program(
    denoiser: nn.Module,
    plan: StepPlan,
    shape: tuple[int, int, int],
    batch: int | None,
    conditions: tuple[Condition, ...] = (),
    decoder: LatentDecoder | None = None,
) -> SamplerProgram:
    """Specialise ``denoiser`` to the plan's timesteps and capture one call; ``batch`` None leaves the batch free.

    Raises UsageError for a network that draws noise, trains or branches inside.
    """
    rows = batch or 2  # torch.export takes a batch of 1 for a constant
    example = torch.zeros(rows, *shape)
    given = {condition.name: torch.from_numpy(condition.examples(0, rows)) for condition in conditions}
    call = export_call(denoiser, typical_timestep(plan.timesteps), example, given, dynamic_batch=batch is None)
    special = specialise(call, plan.timesteps, tuple(given)).eval()
    step = lift(special.body, call, (example, *given.values(), *special.constants(0)))
    decode = None if decoder is None else export_decoder(decoder, shape, batch)
    return SamplerProgram(plan, step, special, shape, batch, conditions, decode)


def export_decoder(decoder: LatentDecoder, shape: tuple[int, int, int], batch: int | None) -> DecoderProgram:
    """Capture the decoder for latents of ``shape``; raises UsageError if it is not static."""
    example = torch.zeros(batch or 2, *shape)
    free = {0: Dim.DYNAMIC} if batch is None else None
    with torch.no_grad(), any_batch("decoder"):
        call = torch.export.export(decoder.eval(), (example,), dynamic_shapes=(free,), strict=False)
    check_static(call.graph)
    (image,) = call.graph.output_node().args[0]
    channels, height, width = (int(size) for size in image.meta["val"].shape[1:])
    return DecoderProgram(call, (channels, height, width), decoder.precision)
