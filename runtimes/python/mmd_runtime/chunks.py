"""Many images through a graph built for few: the checks of a session's inputs, and batches with padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import BatchSpec, Bundle, TensorSpec, batch_axis
from mmd_export.conditions import outside
from mmd_export.errors import UsageError
from mmd_export.runtime import Arrays, Session


def check_inputs(bundle: Bundle, inputs: Arrays) -> int:
    """Compare names, dtypes, shapes and batch with the manifest; returns the batch size, raises ``UsageError``."""
    specs, where = bundle.manifest.inputs, f"bundle {bundle.name}:"
    names = [spec.name for spec in specs]
    for name in inputs:
        if name not in names:
            raise UsageError(f"{where} input '{name}' is unknown, the manifest says {', '.join(names)}; leave it out")
    for name in names:
        if name not in inputs:
            raise UsageError(f"{where} input '{name}' is missing, given: {', '.join(inputs) or 'none'}; add it")
    count = _images(inputs["noise"], bundle.manifest.spec("noise"))
    for spec in specs:
        check_array(bundle, inputs[spec.name], spec, count)
    return count


def check_array(bundle: Bundle, array: Any, spec: TensorSpec, count: int | None = None) -> None:
    """Compare one array with its spec; ``count`` is the batch that all inputs share, else the array's own."""
    where = f"bundle {bundle.name}: input '{spec.name}'"
    if not isinstance(array, np.ndarray) or array.dtype.name != spec.dtype:
        found = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        raise UsageError(f"{where} is {found}, the manifest says {spec.dtype}; convert it with np.asarray")
    if found := outside(array, spec.below):
        raise UsageError("{} holds {}, the manifest says {}; give such values".format(where, *found))
    found_count = _images(array, spec)
    if _matches(array, spec, found_count):
        bundle.manifest.batch.check(found_count, bundle.name, spec.name)
        if count not in (None, found_count):
            raise UsageError(f"{where} has batch {found_count}, 'noise' has {count}; give one for each image")
        return
    says = "(" + ", ".join(str(size) for size in spec.shape) + ("," if len(spec.shape) == 1 else "") + ")"
    raise UsageError(f"{where} is {array.shape}, the manifest says {says}; give that shape")


def check_step(bundle: Bundle, step: int, known: Arrays) -> list[str]:
    """The names that a teacher-forced ``step`` reads, in order: all inputs, then the states before it.

    Raises UsageError unless the step exists and each is given as the manifest says.
    """
    where, steps = f"bundle {bundle.name}:", bundle.golden().steps
    if not 1 <= step <= steps:
        raise UsageError(f"{where} step {step} is asked for; it has steps 1 to {steps}")
    noise = bundle.manifest.spec("noise")
    states = [noise.model_copy(update={"name": f"state.{k}"}) for k in range(1, step)]
    specs = [*bundle.manifest.inputs, *states]
    for spec in specs:
        if spec.name not in known:
            raise UsageError(f"{where} step {step} starts from '{spec.name}', given: {sorted(known)}; add it")
        check_array(bundle, known[spec.name], spec)
    return [spec.name for spec in specs]


def batches(batch: BatchSpec, arrays: Arrays) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
    """Cut arrays of N images into batches that the graph takes; yields each with its number of real images.

    The last one is padded with its last image. ``step_noise`` has its images on axis 1, all else on axis 0.
    """
    total = len(arrays["noise"])
    start = 0
    while start < total:
        size = batch.next_chunk(total - start)
        chosen = np.minimum(np.arange(start, start + size), total - 1)
        yield (
            {name: np.take(array, chosen, axis=batch_axis(name)) for name, array in arrays.items()},
            min(size, total - start),
        )
        start += size


def run_in_batches(session: Session, bundle: Bundle, inputs: Arrays) -> NDArray[Any]:
    """``sample`` of N images from a graph that takes fewer at once: (N, C, H, W), or uint8 (N, H, W, C)."""
    counts = {name: np.asarray(array).shape[batch_axis(name) : batch_axis(name) + 1] for name, array in inputs.items()}
    if "noise" not in counts or len(set(counts.values())) != 1 or counts["noise"] in ((), (0,)):
        where = f"bundle {bundle.name}: inputs hold images"
        raise UsageError(f"{where} {counts}; give 'noise' and as many of everything else")
    parts = [session.run(part)["sample"][:kept] for part, kept in batches(bundle.manifest.batch, inputs)]
    return np.concatenate(parts)


def _images(array: NDArray[Any], spec: TensorSpec) -> int:
    shape = np.shape(array)
    return int(shape[spec.batch_axis]) if len(shape) > spec.batch_axis else 0


def _matches(array: NDArray[Any], spec: TensorSpec, count: int) -> bool:
    """Whether the shape is right apart from the number of images."""
    expected = tuple(count if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape))
    return array.shape == expected
