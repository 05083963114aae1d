"""``mmd-export sample``: a grid of images from a seed, from a bundle, a run folder or a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle
from mmd_export.commands.verify import usable_runtime
from mmd_export.condition_files import read_conditions
from mmd_export.conditions import CLASS_LABELS, Condition
from mmd_export.errors import UsageError
from mmd_export.manifest import MANIFEST_NAME
from mmd_export.network_options import AS_IT_IS, NetworkOptions
from mmd_export.noise import sampler_noise
from mmd_export.plan_options import PlanOptions
from mmd_export.runtime import RunOptions, Runtime, Session, placement_of
from mmd_runtime.chunks import run_in_batches

if TYPE_CHECKING:
    import torch

    from mmd_export.unroll import UnrolledSampler

PART = 256
PART_ON_GPU = 64  # there is less memory, and more of it in use


@dataclass(frozen=True)
class SampleOptions(PlanOptions):
    """``source``: BUNDLE, RUN or MODEL; the options of the plan and ``network`` are for a MODEL only.

    ``runtime`` and ``checkpoint`` are for a BUNDLE only, ``device`` for the others. ``conditions``: ``name=FILE`` for
    what the network is told besides class labels.
    """

    source: str
    seed: int = 0
    count: int = 16
    runtime: str | None = None
    checkpoint: str | None = None
    class_label: int | None = None
    network: NetworkOptions = AS_IT_IS
    conditions: tuple[str, ...] = ()
    device: str | None = None


@dataclass(frozen=True)
class Drawing:
    """Images that are drawn as ``parts`` is iterated; ``shape()`` is (C, H, W) of each, known before that.

    ``ran_in()`` says what draws them, and which nodes a provider left to another, once some are drawn. ``sha256`` is
    that of the artefact, or of weights and plan.
    """

    shape: Callable[[], tuple[int, int, int]]
    parts: Iterator[NDArray[Any]]
    ran_in: Callable[[], str]
    sha256: str

    def images(self, observe: Callable[[int], None] = lambda _done: None) -> NDArray[Any]:
        """All of them; ``observe`` is told how many there are, first 0 and then after each part."""
        observe(0)
        drawn: list[NDArray[Any]] = []
        for part in self.parts:
            drawn.append(part)
            observe(sum(map(len, drawn)))
        return np.concatenate(drawn)


def is_bundle(source: str) -> bool:
    """Whether ``source`` is a folder that claims to be a bundle."""
    return (Path(source) / MANIFEST_NAME).is_file()


def sample(options: SampleOptions) -> NDArray[Any]:
    """Images float32 (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) from a bundle built so; latents are decoded."""
    return draw(options).images()


def draw(options: SampleOptions, rows: range | None = None) -> Drawing:
    """The same in parts, in order, so that a caller can count them; the source is checked before the first is drawn.

    ``rows``: which of them, if not all.
    """
    if options.count < 1:
        raise UsageError(f"--count is {options.count}; it must be at least 1")
    rows = range(options.count) if rows is None else rows
    return _from_bundle(options, rows) if is_bundle(options.source) else _from_model(options, rows)


def _from_bundle(options: SampleOptions, rows: range) -> Drawing:
    bundle = Bundle.open(options.source)
    if bundle.gives_latents:
        raise UsageError(f"bundle {bundle.name} gives latents, no picture; build it with --decode")
    options.require_bundle(bundle.name, len(bundle.manifest.plan["steps"]))
    if options.device is not None:
        raise UsageError(
            f"--device {options.device} goes with a model, {options.source} is a bundle; choose a --runtime"
        )
    runtime = usable_runtime(bundle, options.runtime)
    session = runtime.open(bundle, RunOptions(checkpoint=options.checkpoint))
    if options.network != AS_IT_IS:
        raise UsageError(f"bundle {bundle.name} has guidance and text length built in; leave their options out")
    specs = {spec.name: spec.shape for spec in bundle.manifest.inputs}
    channels, height, width = (int(size) for size in specs["noise"][1:])
    noisy = int(specs["step_noise"][0]) if "step_noise" in specs else 0
    conditions = [
        Condition(
            spec.name,
            "int64" if spec.dtype == "int64" else "float32",
            tuple(int(size) for size in spec.shape[1:]),
            spec.below,
        )
        for spec in bundle.manifest.inputs
        if spec.name not in ("noise", "step_noise")
    ]
    told = _told(options, conditions, f"bundle {bundle.name}")
    part = _part_size(bundle)
    return Drawing(
        lambda: _picture_shape(bundle),
        (
            run_in_batches(session, bundle, inputs)
            for inputs in _inputs(options.seed, (channels, height, width), noisy, told, rows, part)
        ),
        lambda: _ran_in(runtime, session),
        bundle.artefact_sha256,
    )


def _ran_in(runtime: Runtime, session: Session) -> str:
    """``onnxruntime: onnxruntime 1.32.0, CPU``, with where its nodes ran if the session can tell."""
    place = placement_of(session)
    return f"{runtime.name}: {runtime.availability().detail}{f'; {place.summary}' if place else ''}"


def _picture_shape(bundle: Bundle) -> tuple[int, int, int]:
    """(C, H, W) of the sample, which a uint8 one has as (H, W, C)."""
    (spec,) = (spec for spec in bundle.manifest.outputs if spec.name == "sample")
    first, second, third = (int(size) for size in spec.shape[1:])
    return (third, first, second) if spec.dtype == "uint8" else (first, second, third)


def _part_size(bundle: Bundle) -> int:
    """About PART images, in whole batches of the graph where it takes only one size."""
    batch = bundle.manifest.batch.next_chunk(PART)
    return max(1, PART // batch) * batch


def _from_model(options: SampleOptions, rows: range) -> Drawing:
    for flag, value in (("--runtime", options.runtime), ("--checkpoint", options.checkpoint)):
        if value is not None:
            raise UsageError(f"{flag} {value} goes with a bundle, {options.source} is none; build one or leave it out")
    from mmd_export.checkpoint import load_checkpoint
    from mmd_export.decoder import decoded_shape
    from mmd_export.reference import sampler_of
    from mmd_export.torch_device import torch_device

    device = torch_device(options.device)
    checkpoint = load_checkpoint(options.source, network=options.network)
    if checkpoint.latent and checkpoint.decoder is None:
        raise UsageError(f"{checkpoint.name} makes latents, no picture: {checkpoint.no_decoder}")
    plan = checkpoint.plan_for(**options.wanted)
    sampler = sampler_of(checkpoint, plan).to(device)
    told = _told(options, checkpoint.conditions, checkpoint.name)
    parts = _inputs(
        options.seed, checkpoint.shape, plan.noisy_steps, told, rows, PART if device.type == "cpu" else PART_ON_GPU
    )
    return Drawing(
        lambda: checkpoint.shape if checkpoint.decoder is None else decoded_shape(checkpoint.decoder, checkpoint.shape),
        (_sampled(sampler, inputs, device) for inputs in parts),
        lambda: f"torch: torch {version('torch')}, {device.type.upper()}",
        f"{checkpoint.sha256} {plan.digest()}",
    )


def _sampled(sampler: UnrolledSampler, inputs: Mapping[str, NDArray[Any]], device: torch.device) -> NDArray[Any]:
    """The sample, in float32 on every device."""
    import torch

    from mmd_finetune.compute import full_float32

    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    with full_float32(), torch.inference_mode():
        image: NDArray[Any] = sampler(**tensors).cpu().numpy()
        return image


def _inputs(
    seed: int,
    shape: tuple[int, int, int],
    noisy_steps: int,
    told: Mapping[str, NDArray[Any]],
    rows: range,
    part: int,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Noise and conditions of the images ``rows``, ``part`` at a time."""
    for some in (rows[start : start + part] for start in range(0, len(rows), part)):
        noise = sampler_noise(seed, len(some), shape, noisy_steps, some.start)
        yield {**noise, **{name: array[some.start : some.stop] for name, array in told.items()}}


def _told(options: SampleOptions, conditions: Sequence[Condition], where: str) -> dict[str, NDArray[Any]]:
    """Class labels by number, everything else (and labels, if they are given so) from files."""
    by_number = [
        each for each in conditions
        if each.name == CLASS_LABELS and each.dtype == "int64"
        and not any(text.startswith(f"{CLASS_LABELS}=") for text in options.conditions)
    ]  # fmt: skip
    if options.class_label is not None and not by_number:
        raise UsageError(f"{where}: --class-label is {options.class_label}, but no class number is taken; leave it out")
    labels = {each.name: _labels(options, each.below) for each in by_number}
    others = [each for each in conditions if each not in by_number]
    return labels | read_conditions(options.conditions, others, options.count, where)


def _labels(options: SampleOptions, classes: int | None) -> NDArray[np.int64]:
    """One label for all, or 0, 1, 2, ... over the classes where their number is known."""
    if options.class_label is not None:
        if options.class_label < 0 or (classes is not None and options.class_label >= classes):
            raise UsageError(f"--class-label is {options.class_label}; the model knows 0 to {(classes or 1) - 1}")
        return np.full(options.count, options.class_label, dtype=np.int64)
    if classes is None:
        raise UsageError("the bundle is class-conditional and does not tell its classes; pass --class-label")
    return np.arange(options.count, dtype=np.int64) % classes
