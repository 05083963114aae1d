"""A bundle inside an app: ``open_bundle``, images from a seed, and the self-test of the golden file.

Needs numpy and the library that runs the artefact, which is imported when a bundle is opened; never torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mmd_export.bundle import Bundle
    from mmd_export.runtime import Session


@dataclass(frozen=True)
class SelfTest:
    """What the artefact gave on the golden noise, against the float64 reference.

    ``worst``, ``mean``: largest and mean absolute error, on the scale of the output, with ``tolerance`` and
    ``mean_limit``, what they may be. ``milliseconds``: median of one batch.
    """

    bundle: str
    runtime: str
    images: int
    worst: float
    tolerance: float
    mean: float
    mean_limit: float
    fault: str
    milliseconds: float

    @property
    def passed(self) -> bool:
        """Whether every image is as the reference says, within the manifest's tolerance, and all are on average."""
        return not self.fault and self.worst <= self.tolerance and self.mean <= self.mean_limit

    def __str__(self) -> str:
        """One line for people."""
        why = self.fault
        if not why and self.worst <= self.tolerance:
            why = f"mean error {self.mean:.3g} (limit {self.mean_limit:.3g})"
        verdict = "passed" if self.passed else f"FAILED {why}".rstrip()
        return (
            f"self-test {verdict}: {self.bundle} in {self.runtime}, {self.images} images, largest error "
            f"{self.worst:.3g} (tolerance {self.tolerance:g}), {self.milliseconds:.2f} ms a batch"
        )


class Sampler:
    """A bundle, opened and ready to draw."""

    def __init__(self, bundle: Bundle, runtime: str, session: Session) -> None:
        self.bundle, self.runtime, self._session = bundle, runtime, session

    def sample(
        self, seed: int, count: int = 1, first: int = 0, conditions: Mapping[str, NDArray[Any]] | None = None
    ) -> NDArray[Any]:
        """Images ``first`` ... of a seed: float32 (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C) if built so.

        ``conditions``: what the graph takes besides noise, N rows each, such as ``class_labels`` int64 (N,).
        """
        return self.run(self.noise(seed, count, first) | dict(conditions or {}))

    def noise(self, seed: int, count: int = 1, first: int = 0) -> dict[str, NDArray[Any]]:
        """What the graph takes of noise, for those images: ``noise`` and, of a stochastic sampler, ``step_noise``."""
        from mmd_export.noise import sampler_noise

        shapes = {spec.name: spec.shape for spec in self.bundle.manifest.inputs}
        channels, height, width = (int(size) for size in shapes["noise"][1:])
        noisy = int(shapes["step_noise"][0]) if "step_noise" in shapes else 0
        return dict(sampler_noise(seed, count, (channels, height, width), noisy, first))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The images of N rows of every input of the graph, in batches that it takes."""
        from mmd_runtime.chunks import run_in_batches

        return run_in_batches(self._session, self.bundle, inputs)

    def self_test(self, rounds: int = 5) -> SelfTest:
        """Run the golden noise, compare, and time ``rounds`` passes of the first batch."""
        from mmd_export.parity import chunks, compare
        from mmd_export.tolerance import mean_tolerance, uint8_tolerance

        golden, parts = self.bundle.golden(), [inputs for inputs, _ in chunks(self.bundle)]
        found = np.concatenate([self._session.run(inputs)["sample"] for inputs in parts])
        seconds = [self._seconds(parts[0]) for _ in range(max(1, rounds))]
        result = compare("sample", found, golden.sample)
        manifest = self.bundle.manifest
        atol = manifest.tolerance.atol
        in_bytes = golden.sample.dtype == np.uint8
        limit, mean_limit = uint8_tolerance(atol) if in_bytes else (atol, mean_tolerance(atol))
        return SelfTest(
            manifest.name, self.runtime, golden.count, result.max_abs, limit, result.mean_abs, mean_limit,
            "; ".join(result.faults), 1e3 * statistics.median(seconds),
        )  # fmt: skip

    def _seconds(self, inputs: dict[str, NDArray[Any]]) -> float:
        start = time.perf_counter()
        self._session.run(inputs)
        return time.perf_counter() - start


def open_bundle(folder: Path | str, runtime: str | None = None, threads: int = 0) -> Sampler:
    """Check every byte of the bundle and load its artefact.

    ``runtime``: a name as in ``mmd-export doctor``; by default the first that runs the artefact here. ``threads``: CPU
    threads of a run, 0 for the library's choice. Raises ``BundleError`` for a damaged bundle and ``NotAvailableError``,
    with the line that installs what is missing.
    """
    from mmd_export.bundle import Bundle
    from mmd_export.errors import NotAvailableError
    from mmd_export.runtime import RunOptions
    from mmd_runtime.registry import get_runtime, runtime_for

    bundle = Bundle.open(folder)
    chosen = get_runtime(runtime) if runtime else runtime_for(bundle.manifest.format)
    if bundle.manifest.format not in chosen.formats:
        raise NotAvailableError(
            f"bundle {bundle.name} holds format {bundle.manifest.format}, runtime {chosen.name} runs "
            f"{' or '.join(chosen.formats)}; leave the runtime out"
        )
    if not (found := chosen.availability()).available:
        raise NotAvailableError(f"runtime {chosen.name} is not available here: {found.detail}; {found.install}")
    return Sampler(bundle, chosen.name, chosen.open(bundle, RunOptions(threads=threads)))
