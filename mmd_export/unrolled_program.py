"""The whole sampler as one torch.export program, for targets that compile torch: noise [, step_noise] -> sample.

The captured call of a SamplerProgram is run K times by the UnrolledSampler, so nothing but the plan's arithmetic is
written here. Inputs carry the names of the manifest.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mmd_export.program import SamplerProgram
from mmd_export.unroll import UnrolledSampler


class WholeSampler(nn.Module):
    """The sampler with its outputs: the sample, and ``state.1`` ... ``state.K`` if ``states``.

    ``output``: float32 (B, C, H, W) or uint8 (B, H, W, C).
    """

    def __init__(self, program: SamplerProgram, output: str = "float32", *, states: bool = False) -> None:
        super().__init__()
        decoder = None if program.decoder is None else program.decoder.runner()
        self.sampler = UnrolledSampler(program.runner(), program.plan, decoder=decoder)
        self.output, self.states = output, states

    def forward(
        self, noise: Tensor, step_noise: Tensor | None = None, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """The sample, or (sample, state.1, ..., state.K)."""
        states = tuple(self.sampler.chain(noise, step_noise, **conditions))
        image = self.sampler.finish(states[-1])
        sample = as_bytes(image) if self.output == "uint8" else image
        return (sample, *states) if self.states else sample


def as_bytes(image: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] to uint8 (B, H, W, C): round((x / 2 + 0.5) * 255)."""
    return ((image * 0.5 + 0.5) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def unroll(program: SamplerProgram, output: str = "float32", *, states: bool = False) -> ExportedProgram:
    """Capture all K calls; each weight is one input of the program, whatever K is."""
    rows = program.batch or 2  # torch.export takes a batch of 1 for a constant
    inputs = {"noise": torch.zeros(rows, *program.shape)}
    free = None if program.batch else Dim.DYNAMIC
    shapes = {"noise": {0: free}}
    if program.plan.noisy_steps:
        inputs["step_noise"] = torch.zeros(program.plan.noisy_steps, rows, *program.shape)
        shapes["step_noise"] = {1: free}
    for condition in program.conditions:
        inputs[condition.name] = torch.from_numpy(condition.examples(0, rows))
        shapes[condition.name] = {0: free}
    module = _with_named_inputs(WholeSampler(program, output, states=states), tuple(inputs))
    with torch.no_grad():
        return torch.export.export(
            module, tuple(inputs.values()), dynamic_shapes=shapes if free else None, strict=False
        )


def _with_named_inputs(sampler: WholeSampler, names: tuple[str, ...]) -> fx.GraphModule:
    """``forward`` with the inputs by name and place: what comes through ``**`` has no names in a program."""
    graph = fx.Graph()
    given: dict[str, fx.node.Argument] = {name: graph.placeholder(name) for name in names}
    graph.output(graph.call_module("sampler", kwargs=given))
    root = nn.Module()
    root.sampler = sampler
    return fx.GraphModule(root, graph)
