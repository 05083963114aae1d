"""The whole sampler as one torch.export program, for targets that compile torch: noise [, step_noise] -> sample.

The captured call of a SamplerProgram is run K times by the UnrolledSampler, so nothing but the plan's arithmetic is
written here. A target that compiled the call by itself gives it as ``calls``. Inputs carry the names of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mmd_export.plan import StepPlan
from mmd_export.program import SamplerProgram
from mmd_export.unroll import UnrolledSampler


@dataclass(frozen=True)
class Calls:
    """The network, ``forward(x, k, **conditions)``, and the decoder, if there is one, in the form that is to be run."""

    denoiser: nn.Module
    decoder: nn.Module | None = None

    @classmethod
    def captured(cls, program: SamplerProgram) -> Calls:
        """As they were captured."""
        return cls(program.runner(), None if program.decoder is None else program.decoder.runner())


class WholeSampler(nn.Module):
    """The sampler with its outputs: the sample, and ``state.1`` ... ``state.K`` if ``states``.

    ``output``: float32 (B, C, H, W) or uint8 (B, H, W, C).
    """

    def __init__(self, plan: StepPlan, calls: Calls, output: str = "float32", *, states: bool = False) -> None:
        super().__init__()
        self.sampler = UnrolledSampler(calls.denoiser, plan, decoder=calls.decoder)
        self.output, self.states = output, states

    def forward(
        self, noise: Tensor, step_noise: Tensor | None = None, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """The sample, or (sample, state.1, ..., state.K)."""
        states = tuple(self.sampler.chain(noise, step_noise, **conditions))
        image = self.sampler.finish(states[-1])
        sample = as_bytes(image) if self.output == "uint8" else image
        return (sample, *states) if self.states else sample


class OneStep(nn.Module):
    """``state.<step>`` from the inputs and the given states before it, teacher-forced.

    A multistep plan reads outputs of earlier calls: those of the given states.
    """

    def __init__(self, plan: StepPlan, calls: Calls, step: int) -> None:
        super().__init__()
        self.sampler, self.step = UnrolledSampler(calls.denoiser, plan), step

    def forward(self, noise: Tensor, step_noise: Tensor | None = None, **rest: Tensor) -> Tensor:
        """(B, C, H, W); ``state_1`` ... ``state_<step - 1>`` are among ``rest``, beside the conditions."""
        plan, k = self.sampler.plan, self.step - 1
        known: dict[tuple[str, int], Tensor] = {("state", 0): plan.initial_scale * noise}
        for s in range(plan.noisy_steps):
            assert step_noise is not None
            known["noise", s] = step_noise[s]
        for j in range(1, self.step):
            known["state", j] = rest.pop(f"state_{j}")
        for j in sorted({term.index for term in plan.steps[k].update if term.source in ("output", "clean")} - {k}):
            self.sampler.observe(j, known, rest)
        self.sampler.advance(k, known, rest)
        return known["state", self.step]


def as_bytes(image: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] to uint8 (B, H, W, C): round((x / 2 + 0.5) * 255)."""
    return ((image * 0.5 + 0.5) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def unroll(
    program: SamplerProgram, output: str = "float32", *, states: bool = False, calls: Calls | None = None
) -> ExportedProgram:
    """Capture all K calls; each weight is one input of the program, whatever K is."""
    calls = calls or Calls.captured(program)
    return _capture(program, WholeSampler(program.plan, calls, output, states=states))


def unroll_step(program: SamplerProgram, step: int, calls: Calls | None = None) -> ExportedProgram:
    """Capture ``state.<step>`` from the inputs of the sampler, then ``state.1`` ... ``state.<step - 1>``."""
    module = OneStep(program.plan, calls or Calls.captured(program), step)
    return _capture(program, module, tuple(f"state_{j}" for j in range(1, step)))


def _capture(program: SamplerProgram, module: nn.Module, states: tuple[str, ...] = ()) -> ExportedProgram:
    """Export ``module`` for the inputs of the manifest, and ``states`` shaped as the noise."""
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
    for state in states:
        inputs[state] = torch.zeros(rows, *program.shape)
        shapes[state] = {0: free}
    named = _with_named_inputs(module, tuple(inputs))  # no eval(): a captured call has no modes, and says so by raising
    with torch.no_grad():
        return torch.export.export(named, tuple(inputs.values()), dynamic_shapes=shapes if free else None, strict=False)


def _with_named_inputs(sampler: nn.Module, names: tuple[str, ...]) -> fx.GraphModule:
    """``forward`` with the inputs by name and place: what comes through ``**`` has no names in a program."""
    graph = fx.Graph()
    given: dict[str, fx.node.Argument] = {name: graph.placeholder(name) for name in names}
    graph.output(graph.call_module("sampler", kwargs=given))
    root = nn.Module()
    root.sampler = sampler
    return fx.GraphModule(root, graph)
