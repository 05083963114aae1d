"""``verify --distribution``: rung 7, many samples of the artefact against many of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle, take
from mmd_export.comparison import NO_LIMITS, Limits
from mmd_export.distribution import (
    LEAST_COUNT,
    LEVEL,
    NUMPY_ENCODERS,
    PERMUTATIONS,
    Encode,
    TwoSampleTest,
    fresh_noise_test,
    same_noise_test,
)
from mmd_export.errors import UsageError
from mmd_export.noise import sampler_noise
from mmd_export.parity import Rung
from mmd_export.plan import StepPlan
from mmd_export.runtime import RunOptions, Session
from mmd_runtime.chunks import run_in_batches
from mmd_runtime.registry import runtime_for

if TYPE_CHECKING:
    from mmd_export.checkpoint import Checkpoint

TORCH_BATCH = 256
Draw = Callable[[int], NDArray[np.float32]]  # seed -> samples (N, C, H, W) in [-1, 1]


@dataclass(frozen=True)
class DistributionOptions:
    """``against``: a bundle that stands for the reference, where there is no checkpoint or no torch."""

    count: int = 2000
    features: str = "projection"
    against: str | None = None
    seed: int = 11  # the reference's fresh noises are those of the next seed
    level: float = LEVEL
    permutations: int = PERMUTATIONS

    def __post_init__(self) -> None:
        if self.count < LEAST_COUNT:
            raise UsageError(
                f"--count is {self.count}, rung 7 needs at least {LEAST_COUNT} samples; give some thousand"
            )
        if not 0.0 < self.level < 1.0:
            raise UsageError(f"--level is {self.level:g}, it must lie between 0 and 1")
        if (self.permutations + 1) * self.level / 2 < 1.0:
            least = f"{self.permutations} permutations cannot tell p below {self.level / 2:g}"
            raise UsageError(f"{least}, so rung 7 could not fail; raise --level")


def distribution_rung(
    bundle: Bundle,
    session: Session,
    sampler: tuple[Checkpoint, StepPlan] | None,
    options: DistributionOptions,
    notify: Callable[[str], None] = lambda _: None,
    limits: Limits = NO_LIMITS,
) -> Rung:
    """Rung 7 against ``sampler``, or against the bundle that the options name."""
    artefact = bundle_draw(bundle, session, options.count)
    if options.against is not None:
        reference = _of_bundle(bundle, options)
    else:
        assert sampler is not None, "verify asks for one of both"
        reference = checkpoint_draw(bundle, *sampler, options.count)
    encode = find_encoder(options.features, as_images(bundle.golden().sample).shape[1:])
    return Rung(7, tests=distribution_tests(artefact, reference, encode, options, pixel_atol(bundle, limits), notify))


def pixel_atol(bundle: Bundle, limits: Limits = NO_LIMITS) -> float:
    """The tolerance of a sample on the scale of pixels in [-1, 1]; one that is given in levels is not on that scale."""
    atol, uint8 = bundle.manifest.tolerance.atol, bundle.golden().sample.dtype == np.uint8
    return limits.atol.get("", atol) if uint8 else limits.atol_of("sample", atol)


def distribution_tests(
    artefact: Draw,
    reference: Draw,
    encode: Encode,
    options: DistributionOptions,
    atol: float,
    notify: Callable[[str], None] = lambda _: None,
) -> tuple[TwoSampleTest, ...]:
    """Both tests, each at half the level: against the reference on the same noises, and on fresh ones.

    ``atol``: how far pixels may be off, on the same noises.
    """
    features, level, permutations = options.features, options.level / 2, options.permutations
    notify(f"rung 7: {options.count} samples of the artefact")
    ours = encode(artefact(options.seed))
    notify(f"rung 7: {options.count} samples of the reference on same noise")
    images = reference(options.seed)
    moved = [encode(images + np.float32(shift)) for shift in (atol, -atol)]
    same = same_noise_test(features, ours, encode(images), moved, level, permutations)
    notify(f"rung 7: {options.count} samples of the reference on fresh noise")
    fresh = fresh_noise_test(features, ours, encode(reference(options.seed + 1)), level, permutations)
    return same, fresh


def bundle_draw(bundle: Bundle, session: Session, count: int) -> Draw:
    """Samples of a bundle; what it is told besides noise are the golden file's conditions, over and over."""

    def draw(seed: int) -> NDArray[np.float32]:
        return as_images(run_in_batches(session, bundle, inputs_of(bundle, seed, 0, count)))

    return draw


def inputs_of(bundle: Bundle, seed: int, first: int, count: int) -> dict[str, NDArray[Any]]:
    """The inputs of images ``first`` ... of one seed."""
    golden = bundle.golden()
    noisy = 0 if golden.step_noise is None else len(golden.step_noise)
    channels, height, width = golden.noise.shape[1:]
    inputs: dict[str, NDArray[Any]] = dict(sampler_noise(seed, count, (channels, height, width), noisy, first))
    rows = np.arange(first, first + count) % golden.count
    return inputs | {name: array[rows] for name, array in golden.inputs.items() if name not in inputs}


def as_images(sample: NDArray[Any]) -> NDArray[np.float32]:
    """(N, C, H, W) in [-1, 1], of floats or of bytes (N, H, W, C)."""
    if sample.dtype != np.uint8:
        return sample.astype(np.float32)
    return np.ascontiguousarray(sample.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def checkpoint_draw(bundle: Bundle, checkpoint: Checkpoint, plan: StepPlan, count: int) -> Draw:
    """The unrolled sampler in torch, float32; rounded to bytes where the artefact gives bytes."""
    from mmd_export.reference import run_chain, sampler_of, to_uint8

    sampler, uint8 = sampler_of(checkpoint, plan), bundle.golden().sample.dtype == np.uint8

    def draw(seed: int) -> NDArray[np.float32]:
        inputs, parts = inputs_of(bundle, seed, 0, count), []
        for start in range(0, count, TORCH_BATCH):
            rows = slice(start, min(start + TORCH_BATCH, count))
            sample = run_chain(sampler, {name: take(name, array, rows) for name, array in inputs.items()})["sample"]
            parts.append(as_images(to_uint8(sample) if uint8 else sample))
        return np.concatenate(parts)

    return draw


def _of_bundle(bundle: Bundle, options: DistributionOptions) -> Draw:
    """Another bundle of the same checkpoint and plan, in the first runtime that fits it."""
    assert options.against is not None
    other = Bundle.open(options.against)
    for what, ours, theirs in (
        ("checkpoint", bundle.manifest.checkpoint.sha256[:12], other.manifest.checkpoint.sha256[:12]),
        ("plan", _digest(bundle), _digest(other)),
        ("decoder", bundle.manifest.decoder, other.manifest.decoder),
    ):
        if ours != theirs:
            raise UsageError(
                f"--against {other.name} has {what} {theirs}, bundle {bundle.name} has {ours}; give one of the same"
            )
    return bundle_draw(other, runtime_for(other.manifest.format).open(other, RunOptions()), options.count)


def _digest(bundle: Bundle) -> str:
    return StepPlan.from_dict(bundle.manifest.plan).digest()[:12]


def find_encoder(name: str, shape: tuple[int, ...]) -> Encode:
    """An encoder for images ``shape`` (C, H, W): of this package, by numpy alone, or of ``mmd_finetune.features``."""
    if name in NUMPY_ENCODERS:
        return NUMPY_ENCODERS[name]
    try:
        import torch

        from mmd_finetune.features import load_encoder, require_fit
    except ImportError as error:
        known = ", ".join(NUMPY_ENCODERS)
        raise UsageError(f"--features {name} needs torch ({error}); without it there are {known}") from error
    encoder = load_encoder(name)
    channels, height, width = shape
    require_fit(encoder, (channels, height, width))

    def encode(images: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.inference_mode():
            parts = [encoder(part).double() for part in torch.from_numpy(images).split(TORCH_BATCH)]
        features: NDArray[np.float64] = torch.cat(parts).numpy()
        return features

    return encode
