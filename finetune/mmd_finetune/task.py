"""What a run works on, made once from its settings: network, plan, real images, references. Checks everything."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import UndefinedError, UsageError
from mmd_export.plan import StepPlan
from mmd_export.torch_device import torch_device
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.balance import BATCHES, balanced_weights, equal_weights
from mmd_finetune.compute import tuning_form
from mmd_finetune.embedding import batch_rows
from mmd_finetune.features import Encoder, load_encoders, require_names
from mmd_finetune.kernels import parse_kernel
from mmd_finetune.metrics import sample_many, sampler_inputs
from mmd_finetune.metrics.bootstrap import Measured
from mmd_finetune.metrics.real import Real
from mmd_finetune.metrics.suite import Features, MetricOptions, measure
from mmd_finetune.real_features import RealFeatures, features_of_first
from mmd_finetune.reference import LANDMARKS, Reference, encode_in_batches, make_reference
from mmd_finetune.settings import SEED_LIMIT, FinetuneSettings
from mmd_finetune.trainable import Trainable, make_emulation, make_trainable, require_continuous_time
from mmd_finetune.world import World

if TYPE_CHECKING:
    from mmd_finetune.emulation import Emulation

# Noise that no seed of a run can draw: for choosing the best weights, and for the numbers that are reported.
SELECTION_SEED = SEED_LIMIT + 1
REPORT_SEED = SEED_LIMIT + 2
RESAMPLES = 200  # draws behind an interval
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """An encoder that only scores, and its ``features`` float32 (M, d) of real images, which all evaluations share.

    ``training``: those of the loss's images, where a metric compares with both.
    """

    encoder: Encoder
    features: Real
    training: Real | None = None


@dataclass(frozen=True)
class Task:
    """The fixed side of a run.

    ``loss_weights``: what the MMD^2 of each encoder is multiplied with before they are summed. ``holdouts``: the first
    one decides which weights are best.
    """

    settings: FinetuneSettings
    base: Checkpoint
    plan: StepPlan
    data_sha256: str
    references: tuple[Reference, ...]
    loss_weights: Mapping[str, float]
    holdouts: tuple[HeldOut, ...]
    real_count: int
    device: torch.device
    world: World
    emulation: Emulation | None = None

    @property
    def holdout(self) -> Encoder:
        """The held-out encoder that decides."""
        return self.holdouts[0].encoder

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """Those of the loss, then the held-out ones."""
        of_loss = (reference.encoder for reference in self.references)
        return (*of_loss, *(holdout.encoder for holdout in self.holdouts))

    def trainable(self) -> Trainable:
        """The model before tuning, with gradients where the settings want them; a new copy each time."""
        return make_trainable(self.base, self.plan, self.settings, self.emulation)

    def shipped(self, tuned: nn.Module) -> Trainable:
        """What a run leaves: ``tuned``, its adapters merged into plain weights."""
        assert isinstance(tuned, Trainable), "a run tunes what Task.trainable gives"
        return tuned.shipped(self.base)

    def sampler(self, denoiser: nn.Module) -> UnrolledSampler:
        """The plan over ``denoiser``: what is measured and shipped."""
        if isinstance(denoiser, Trainable):
            return denoiser.sampler()
        return UnrolledSampler(AtTimesteps(denoiser, self.plan.timesteps), self.plan)

    def tuning_sampler(self, denoiser: nn.Module) -> UnrolledSampler:
        """The same numbers over the same weights, run in the memory and the arithmetic that the settings ask for."""
        settings = self.settings

        def form(network: nn.Module) -> nn.Module:
            return tuning_form(
                network, autocast=settings.autocast, channels_last=settings.channels_last, compiled=settings.compile
            )

        if isinstance(denoiser, Trainable):
            return denoiser.sampler(form, checkpoint_calls=settings.checkpoint_calls)
        return UnrolledSampler(
            AtTimesteps(form(denoiser), self.plan.timesteps), self.plan, checkpoint_calls=settings.checkpoint_calls
        )

    def noise_of(self, iteration: int) -> dict[str, Tensor]:
        """The sampler's inputs for this process's share of an iteration's batch, in the memory of the host.

        A function of (seed, iteration), so no generator state is kept; all processes together draw what one would.
        """
        share = self.world.share(self.settings.batch_size)
        first = iteration * self.settings.batch_size + share.start
        host = torch.device("cpu")
        inputs = sampler_inputs(self.settings.seed, len(share), self.base.shape, self.plan.noisy_steps, first, host)
        if self.device.type == "cpu":
            return inputs
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}

    def real_rows(self, iteration: int) -> Tensor:
        """Which real images the reference ``batch`` compares with: of the whole batch, the same in every process."""
        settings = self.settings
        return batch_rows(settings.seed, iteration, settings.batch_size, self.real_count)

    def generator_seed(self, iteration: int, part: int) -> int:
        """For torch's own generator, which an encoder may draw from: another one for every micro-batch."""
        drawn = f"{self.settings.seed} {iteration} {self.world.rank} {part}".encode()
        return int.from_bytes(hashlib.sha256(drawn).digest()[:7], "big")

    def samples(
        self, denoiser: nn.Module, seed: int, count: int | None = None, *, give_way: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Samples (N, C, H, W) of the images 0 ... N - 1 of ``seed``; by default ``evaluate_count`` of them.

        Each process draws its share, all receive all. ``give_way`` is called before every batch.
        """
        settings = self.settings
        share = self.world.share(count or settings.evaluate_count)
        own = sample_many(
            self.sampler(denoiser),
            self.base.shape,
            len(share),
            seed,
            batch=settings.micro_batch_size or settings.batch_size,
            device=self.device,
            first=share.start,
            give_way=give_way,
        )
        return self.world.gather(own)[0]

    def judge(self, images: Tensor) -> dict[str, dict[str, Measured]]:
        """``frechet`` and the metrics of the settings in every held-out encoder: encoder -> name -> value.

        The encoder that decides comes first. Where it gives an image no finite features the distance is infinite, and
        alone; a metric that these images leave undefined is left out with a warning.
        """
        return {holdout.encoder.name: self._judged_by(holdout, images) for holdout in self.holdouts}

    def _judged_by(self, holdout: HeldOut, images: Tensor) -> dict[str, Measured]:
        features = encode_in_batches(holdout.encoder, images, self.settings.encoded_at_once)
        if not bool(torch.isfinite(features).all()):
            LOG.warning("%s gives an image no finite features; no metric is measured", holdout.encoder.name)
            return {"frechet": Measured(math.inf)}
        split = holdout.training, None if holdout.training is None else holdout.features
        sets = Features(holdout.encoder.name, holdout.features, features, MetricOptions(resamples=RESAMPLES), *split)
        found = measure(("frechet",), sets)
        for name in self.settings.metrics:
            if name in found:
                continue
            try:
                found |= measure((name,), sets)
            except UndefinedError as error:
                LOG.warning("%s is left out: %s", name, error)
        return found

    def record(self) -> dict[str, Any]:
        """What makes the run what it is; resuming compares it. No path of this machine."""
        return {
            "settings": self.settings.public(),
            **({} if self.base.hub_id is None else {"base_model": self.base.hub_id}),
            "base_sha256": self.base.sha256,
            "data_sha256": self.data_sha256,
            "plan_sha256": self.plan.digest(),
            **{f"sha256 of encoder {encoder.name}": encoder.sha256 for encoder in self.encoders},
            **({} if self.emulation is None else {"quantisation_sha256": self.emulation.record.digest()}),
        }


def prepare(settings: FinetuneSettings, world: World | None = None) -> Task:
    """Load and check all that ``settings`` name; raises UsageError before any work is done.

    ``world`` are the processes that share the work, each of which calls this; None is this one alone. The first one
    reads and encodes the images, the others receive their features.
    """
    world = world or World()
    if world.size > settings.batch_size:
        raise UsageError(
            f"{world.size} processes for a batch of {settings.batch_size}; start fewer or raise --batch-size"
        )
    models = world.together(lambda: _models(settings, world))
    real = features_of_first(settings, models.base.shape, models.encoders, models.holdouts, models.device, world)
    return world.together(lambda: _task(models, real, world))


@dataclass(frozen=True)
class _Models:
    """The networks of a run, on ``device``."""

    settings: FinetuneSettings
    base: Checkpoint
    plan: StepPlan
    encoders: tuple[Encoder, ...]
    holdouts: tuple[Encoder, ...]
    device: torch.device


def _models(settings: FinetuneSettings, world: World) -> _Models:
    parse_kernel(settings.kernel)
    device = _device(settings.device, world)
    base = load_checkpoint(settings.model)
    if base.classes is not None:
        raise UsageError(
            f"model {base.name} is conditional on {base.classes} classes; only unconditional ones are tuned"
        )
    if base.latent:
        raise UsageError(f"model {base.name} makes latents; only models of pixels are tuned")
    if base.conditions:
        told = ", ".join(each.name for each in base.conditions)
        raise UsageError(f"model {base.name} is conditional on {told}; only unconditional ones are tuned")
    if not base.configs:
        raise UsageError(
            f"model {settings.model} has no diffusers config, so no run folder can hold it tuned; build it"
        )
    plan = base.plan_for(**settings.plan_options().wanted)
    encoders = load_encoders(settings.features, base.shape, device)
    holdouts = load_encoders(settings.holdout, base.shape, device, gradient=False)
    require_names((*encoders, *holdouts))
    return _Models(settings, base, plan, encoders, holdouts, device)


def _task(models: _Models, real: RealFeatures, world: World) -> Task:
    settings, base = models.settings, models.base
    base.denoiser.to(models.device)
    if settings.learn == "plan":
        require_continuous_time(base, models.plan)
    held_out = [Real(features) for features in real.held_out]
    training = [Real(features) for features in real.training] or (None,) * len(held_out)
    task = Task(
        settings=settings,
        base=base,
        plan=models.plan,
        data_sha256=real.data_sha256,
        references=tuple(_reference(*each, settings) for each in zip(models.encoders, real.train, strict=True)),
        loss_weights={},
        holdouts=tuple(HeldOut(*each) for each in zip(models.holdouts, held_out, training, strict=True)),
        real_count=len(real.train[0]),
        device=models.device,
        world=world,
        emulation=make_emulation(base, models.plan, settings),
    )
    return replace(task, loss_weights=_loss_weights(task))


def _loss_weights(task: Task) -> dict[str, float]:
    """By the settings; the untuned model is sampled only where there is something to balance."""
    settings = task.settings
    if not settings.balanced or len(task.references) == 1:
        return equal_weights(task.references)
    count = min(settings.evaluate_count, BATCHES * settings.batch_size)
    alone = replace(task, world=World())  # every process draws all of them: none waits for one that failed
    images = alone.samples(alone.trainable(), SELECTION_SEED, count)
    return balanced_weights(task.references, images, settings.batch_size, settings.encoded_at_once)


def _reference(encoder: Encoder, features: Tensor, settings: FinetuneSettings) -> Reference:
    return make_reference(
        encoder,
        settings.kernel,
        features,
        kind=settings.reference,
        biased=settings.estimator == "biased",
        landmarks=settings.landmarks or LANDMARKS,
        seed=settings.seed,
    )


def _device(name: str, world: World) -> torch.device:
    device = torch_device(name)
    return world.device if world.size > 1 else device
