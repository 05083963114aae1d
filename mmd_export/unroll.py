"""The one sampler: it runs a StepPlan. The module that is tuned is the module that ships."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan, Term


class UnrolledSampler(nn.Module):
    """noise -> sample by K network calls; differentiable, exportable, nothing random inside.

    Args:
        denoiser: called as ``denoiser(x, k, **conditions)`` for call k = 0 ... K-1: an ``AtTimesteps`` or its
            specialised form.
        plan: the numbers.
        checkpoint_calls: recompute every network call in the backward pass, so that memory does not grow with K.
        decoder: makes an image of the last state, a latent.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        plan: StepPlan,
        *,
        checkpoint_calls: bool = False,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.plan = plan
        self.checkpoint_calls = checkpoint_calls
        self.decoder = decoder

    def forward(self, noise: Tensor, step_noise: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """Sample from ``noise`` (B, C, H, W) and, if stochastic, ``step_noise`` (S, B, C, H, W).

        It is (B, C, H, W), or an image (B, 3, fH, fW) where there is a decoder.
        """
        state = noise
        for state in self.chain(noise, step_noise, **conditions):  # noqa: B007 - the last state is the sample
            pass
        return self.finish(state)

    def finish(self, state: Tensor) -> Tensor:
        """The last state as the graph returns it: clamped to [-1, 1], decoded before that, or a latent as it is."""
        if self.decoder is not None:
            image: Tensor = self.decoder(state)
            return image.clamp(-1.0, 1.0)
        return state.clamp(-1.0, 1.0) if self.plan.clamp_output else state

    def chain(self, noise: Tensor, step_noise: Tensor | None = None, **conditions: Tensor) -> Iterator[Tensor]:
        """``state.1`` ... ``state.K``, each (B, C, H, W), unclamped."""
        noisy = 0 if step_noise is None else len(step_noise)
        if noisy != self.plan.noisy_steps:
            raise UsageError(f"step_noise holds {noisy} noises, the plan draws {self.plan.noisy_steps}")
        known: dict[tuple[str, int], Tensor] = {("noise", s): z for s, z in enumerate(step_noise if noisy else ())}  # type: ignore[arg-type]
        known["state", 0] = noise if self.plan.initial_scale == 1.0 else self.plan.initial_scale * noise
        for k in range(self.plan.step_count):
            self.advance(k, known, conditions)
            yield known["state", k + 1]

    def advance(self, k: int, known: dict[tuple[str, int], Tensor], conditions: Mapping[str, Tensor]) -> None:
        """Add output_k, clean_k and state_{k+1} to ``known``; the docstring of ``mmd_export.plan`` has the formula."""
        self.observe(k, known, conditions)
        known["state", k + 1] = weighted_sum(self.plan.steps[k].update, known)

    def observe(self, k: int, known: dict[tuple[str, int], Tensor], conditions: Mapping[str, Tensor]) -> None:
        """Add output_k and clean_k, the part of call k that calls the network."""
        step, state = self.plan.steps[k], known["state", k]
        output = known["output", k] = self._call(state if step.scale == 1.0 else step.scale * state, k, conditions)
        if step.clean is not None:
            a, b = step.clean
            guess = b * output if a == 0.0 else a * state + b * output
            known["clean", k] = guess.clamp(-self.clip, self.clip)

    @property
    def clip(self) -> float:
        """Range of the clean guess."""
        assert self.plan.clip is not None  # StepPlan checks it for every step that clamps
        return self.plan.clip

    def _call(self, x: Tensor, k: int, conditions: Mapping[str, Tensor]) -> Tensor:
        if self.checkpoint_calls and torch.is_grad_enabled():
            call = partial(self.denoiser, x, k, **conditions)
            output: Tensor = checkpoint(call, use_reentrant=False)
        else:
            output = self.denoiser(x, k, **conditions)
        return output


def weighted_sum(terms: tuple[Term, ...], known: dict[tuple[str, int], Tensor]) -> Tensor:
    """Sum of ``weight * known[source, index]`` in the order of ``terms``."""
    first, *rest = terms
    total = first.weight * known[first.source, first.index]
    for term in rest:
        total = total + term.weight * known[term.source, term.index]
    return total
