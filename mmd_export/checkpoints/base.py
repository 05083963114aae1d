"""What every source becomes: ``Checkpoint``, a network with all that a plan and a graph need to know of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mmd_export.checkpoints.agreement import require_same_prediction
from mmd_export.conditions import CLASS_LABELS, Condition
from mmd_export.denoiser import InDouble
from mmd_export.errors import UsageError
from mmd_export.network_options import Choice
from mmd_export.plan import StepPlan, is_learned
from mmd_export.plans import choose_plan, plan_again
from mmd_export.schedule import SchedulerConfig
from mmd_export.tolerance import EXACT
from mmd_export.tuned_precision import TunedPrecision

if TYPE_CHECKING:
    from mmd_export.checkpoints.autoencoder import Autoencoder
    from mmd_export.decoder import LatentDecoder


@dataclass(frozen=True)
class Checkpoint:
    """A network with everything that a plan and a graph need to know of it.

    ``shape`` is (C, H, W) of one sample; ``conditions`` what the network is told besides, ``unconditional`` what takes
    their place in guidance (a null class or the name of an input), ``options`` what was chosen about the network;
    ``prediction`` what it predicts, where its class fixes it; ``plan`` the plan that a run folder was tuned for and
    ``tuned_precision`` the lower precision, if it was tuned in one;
    ``licence`` what the source states of its weights, ``lineage`` what they were made of, in the words of a card;
    ``warnings`` what the user should hear. ``folder`` is where the source lies. ``configs`` are the files, by relative
    POSIX path, that make a diffusers folder of the denoiser's weights: those of the source byte for byte, or those that
    its conversion amounts to; empty if diffusers has no class for the network. ``latent``: the state is a latent, which
    no plan clamps; ``decoder`` makes images of it, ``no_decoder`` says why there is none, and ``network_sha256`` is the
    hash without the decoder. ``hub_id``: ``owner/name``, of one that was fetched from the hub.
    """

    name: str
    folder: Path
    denoiser: nn.Module
    scheduler: SchedulerConfig
    shape: tuple[int, int, int]
    sha256: str
    conditions: tuple[Condition, ...] = ()
    unconditional: Mapping[str, int | str] = field(default_factory=dict)
    options: Mapping[str, Choice] = field(default_factory=dict)
    prediction: str | None = None
    plan: StepPlan | None = None
    licence: str | None = None
    warnings: tuple[str, ...] = ()
    configs: Mapping[str, bytes] = field(default_factory=dict)
    latent: bool = False
    decoder: LatentDecoder | None = None
    no_decoder: str = "it has no autoencoder (vae/ or vqvae/)"
    network_sha256: str | None = None
    tuned_precision: TunedPrecision | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    hub_id: str | None = None

    @property
    def classes(self) -> int | None:
        """The number of class labels; None if the network takes none."""
        return next((each.below for each in self.conditions if each.name == CLASS_LABELS), None)

    def plan_for(
        self,
        steps: int | None = None,
        *,
        sampler: str | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> StepPlan:
        """The plan of a run folder, or the one that the options ask for.

        Raises UsageError if no step count is known, or if a run folder was tuned for another plan.
        """
        if sampler is not None:
            require_same_prediction(self.scheduler, sampler, self.name)
        if self.plan is None:
            if steps is None and timesteps is None:
                raise UsageError(f"{self.name}: --steps is missing; say how many network calls the sampler makes")
            plan = choose_plan(self.scheduler, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
            return self._suited(plan)
        tuned = self._suited(self.plan)
        if all(option is None for option in (steps, sampler, eta, spacing, timesteps)):
            return tuned
        if is_learned(self.plan):
            self._require_unasked(steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
            return tuned
        wanted = self._suited(
            plan_again(self.plan, self.scheduler, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
        )
        if not wanted.agrees(tuned, EXACT.atol):
            raise UsageError(
                f"{self.name}: tuned for {describe(self.plan)}, asked for {describe(wanted)}; "
                "leave the sampler options out, or tune for that plan"
            )
        return tuned

    def _require_unasked(self, steps: int | None, **options: object) -> None:
        """Raise UsageError if an option asks for another plan than the learned one, which no solver's options name."""
        assert self.plan is not None
        asked = {name: value for name, value in options.items() if value is not None}
        if steps not in (None, self.plan.step_count):
            asked["steps"] = steps
        if asked:
            name, value = next(iter(asked.items()))
            raise UsageError(
                f"{self.name}: its plan was learned ({describe(self.plan)}), --{name} is {value}; leave the sampler "
                "options out, or tune for that plan"
            )

    def _suited(self, plan: StepPlan) -> StepPlan:
        """The plan for this network: latents are not clamped. Raises UsageError if it is for another prediction."""
        if self.prediction not in (None, plan.prediction_type):
            raise UsageError(
                f"{self.name}: the model predicts {self.prediction}, --sampler {plan.solver} expects "
                f"{plan.prediction_type}; leave the sampler options out"
            )
        return replace(plan, clamp_output=False) if self.latent else plan

    def as_double(self) -> Checkpoint:
        """The same network and decoder in float64, on their own copy of the weights."""
        decoder = None if self.decoder is None else copy.deepcopy(self.decoder).double()
        return replace(self, denoiser=InDouble(copy.deepcopy(self.denoiser)), decoder=decoder)

    @contextmanager
    def doubled(self) -> Iterator[Checkpoint]:
        """``as_double`` for one block, on the weights themselves: both types at once would be three times the memory.

        Back in their own type, which is exact, they are what they were. What a network stores beside them is a copy.
        """
        modules = [module for module in (self.denoiser, self.decoder) if module is not None]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        shared = {id(tensor): tensor for tensor in tensors if tensor.is_floating_point()}
        types = {key: tensor.dtype for key, tensor in shared.items()}
        denoiser = copy.deepcopy(self.denoiser, dict(shared))
        decoder = copy.deepcopy(self.decoder, dict(shared))
        try:
            for tensor in shared.values():
                tensor.data = tensor.data.double()
            yield replace(self, denoiser=InDouble(denoiser), decoder=None if decoder is None else decoder.double())
        finally:
            for key, tensor in shared.items():
                tensor.data = tensor.data.to(types[key])

    def of_latents(self, autoencoder: Autoencoder) -> Checkpoint:
        """The same network as one of latents, with the decoder of ``autoencoder`` if it has one."""
        decoder, reason = autoencoder.decoder, autoencoder.reason
        if decoder is None:
            return replace(self, latent=True, no_decoder=reason)
        both = sha256(f"{self.sha256} {autoencoder.sha256}".encode()).hexdigest()
        warnings = (*self.warnings, *autoencoder.warnings)
        return replace(self, latent=True, decoder=decoder, sha256=both, network_sha256=self.sha256, warnings=warnings)

    def ending_in(self, *, image: bool) -> Checkpoint:
        """For a graph that ends in the decoder, or in the state; raises UsageError if there is no decoder to end in."""
        if image and self.decoder is None:
            raise UsageError(f"{self.name}: --decode needs a decoder: {self.no_decoder}")
        if image or self.decoder is None:
            return self
        return replace(self, decoder=None, sha256=self.network_sha256 or self.sha256, network_sha256=None)


def describe(plan: StepPlan) -> str:
    """One phrase: solver, step count, settings that matter."""
    eta = plan.settings.get("eta")
    extra = f", eta {eta:g}" if isinstance(eta, float | int) and eta else ""
    return f"{plan.solver} with {plan.step_count} steps ({plan.settings.get('timestep_spacing')}{extra})"


def diffusers_configs(config: Mapping[str, Any], scheduler: SchedulerConfig) -> dict[str, bytes]:
    """``unet/config.json`` and ``scheduler/scheduler_config.json`` of a converted network."""
    return {
        "unet/config.json": _json(config),
        "scheduler/scheduler_config.json": _json({"_class_name": scheduler.class_name, **scheduler.stated()}),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
