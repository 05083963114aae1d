"""Parity: measure, then judge. Functions return numbers, verdicts are properties. No torch.

The ladder's rungs are numbered as in the documentation; this file holds the comparison, the reports, and rung 6, which
needs nothing but a bundle and a runtime. Rungs 1 to 5 need the checkpoint: ``mmd_export.ladder``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle, batch_axis
from mmd_export.errors import ParityError
from mmd_export.runtime import ChainSession, Placement, RunOptions, Runtime, Session, placement_of
from mmd_export.tolerance import UINT8_LEVELS

RUNGS = {
    1: "exact answers (Gaussian data, closed form)",
    2: "plan against diffusers' scheduler, float64",
    3: "unrolled sampler, float64 to float32",
    4: "specialised program",
    5: "exported program",
    6: "artefact in its runtime",
}


@dataclass(frozen=True)
class Comparison:
    """Two arrays of the same thing. ``faults`` are failures whatever the tolerance."""

    name: str
    max_abs: float
    mean_abs: float
    worst_index: tuple[int, ...] | None = None
    faults: tuple[str, ...] = ()

    def passes(self, atol: float) -> bool:
        """Whether nothing is wrong and nothing is further off than ``atol``."""
        return not self.faults and self.max_abs <= atol

    def to_dict(self) -> dict[str, Any]:
        finite = self.max_abs if np.isfinite(self.max_abs) else None
        return {"name": self.name, "max_abs": finite, "mean_abs": self.mean_abs if finite is not None else None} | {
            "worst_index": self.worst_index, "faults": list(self.faults),
        }  # fmt: skip


def compare(name: str, actual: NDArray[Any], expected: NDArray[Any], *, image: bool = True) -> Comparison:
    """Compare ``actual`` (N, ...) with ``expected``; ``image`` also refuses constant images."""
    faults: list[str] = []
    if actual.shape != expected.shape:
        return Comparison(name, np.inf, np.inf, faults=(f"shape {actual.shape}, expected {expected.shape}",))
    if actual.dtype != expected.dtype and not (actual.dtype.kind == expected.dtype.kind == "f"):
        faults.append(f"dtype {actual.dtype}, expected {expected.dtype}")
    if np.isnan(actual).any():
        faults.append(f"{int(np.isnan(actual).sum())} NaN values")
    if np.isinf(actual).any():
        faults.append(f"{int(np.isinf(actual).sum())} infinite values")
    pixels = tuple(range(1, actual.ndim))
    lowest, highest = (actual.min(axis=pixels), actual.max(axis=pixels)) if actual.size else (np.zeros(0), np.ones(0))
    constant = np.flatnonzero(lowest == highest) if image else np.zeros(0, dtype=int)
    if len(constant):
        faults.append(f"image {int(constant[0])} is constant")
    if not actual.size:
        faults.append("no values")
    with np.errstate(invalid="ignore"):  # inf - inf is a fault, named above
        error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    error = np.where(np.isfinite(error), error, np.inf)
    worst = np.unravel_index(int(error.argmax()), error.shape) if error.size else None
    index = None if worst is None else tuple(int(i) for i in worst)
    return Comparison(
        name, float(error.max(initial=0.0)), float(error.mean()) if error.size else 0.0, index, tuple(faults)
    )


@dataclass(frozen=True)
class Rung:
    """One stage of the ladder against the stage before it.

    ``skipped`` says why nothing was compared, ``unseen`` why the states inside an artefact were not; ``placement`` is
    where its nodes ran, if the runtime can tell.
    """

    number: int
    comparisons: tuple[Comparison, ...] = ()
    atol: float = 0.0
    skipped: str = ""
    sample_atol: float | None = None  # where the output is not of the states' scale (uint8)
    unseen: str = ""
    placement: Placement | None = None

    @property
    def title(self) -> str:
        """What this rung checks."""
        return RUNGS[self.number]

    def limit(self, comparison: Comparison) -> float:
        """The tolerance of one comparison."""
        return self.sample_atol if comparison.name == "sample" and self.sample_atol is not None else self.atol

    @property
    def failures(self) -> tuple[Comparison, ...]:
        """The comparisons that do not pass."""
        return tuple(c for c in self.comparisons if not c.passes(self.limit(c)))

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it passes."""
        return bool(self.comparisons) and not self.failures

    @property
    def verdict(self) -> str:
        """Passed, failed, or not checked."""
        return "not checked" if self.skipped else "passed" if self.passed else "failed"

    @property
    def worst(self) -> float:
        """The largest error, which is also the smallest tolerance that would have passed; faults aside."""
        scaled = [c.max_abs for c in self.comparisons if self.sample_atol is None or c.name != "sample"]
        return max(scaled, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rung": self.number, "title": self.title, "verdict": self.verdict, "atol": self.atol,
            "worst": self.worst if np.isfinite(self.worst) else None, "skipped": self.skipped, "unseen": self.unseen,
            "comparisons": [c.to_dict() for c in self.comparisons],
            "placement": None if self.placement is None else self.placement.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class ParityReport:
    """Every rung that was asked for, in order. ``detail`` says what the runtime is."""

    bundle: str
    runtime: str
    rungs: tuple[Rung, ...]
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether no rung failed and the artefact itself was compared."""
        checked = [rung for rung in self.rungs if not rung.skipped]
        return all(rung.passed for rung in checked) and any(rung.number == 6 for rung in checked)

    def require(self) -> None:
        """Raise ParityError that names the first rung and comparison that fail."""
        for rung in self.rungs:
            if rung.verdict == "failed":
                raise ParityError(f"bundle {self.bundle}: rung {rung.number} ({rung.title}) failed: {_reason(rung)}")
        if not self.passed:
            raise ParityError(f"bundle {self.bundle}: the artefact was not compared with its golden file")

    def to_dict(self) -> dict[str, Any]:
        rungs = [rung.to_dict() for rung in self.rungs]
        about = {"bundle": self.bundle, "runtime": self.runtime, "detail": self.detail}
        return {**about, "passed": self.passed, "rungs": rungs}


def _reason(rung: Rung) -> str:
    if not rung.failures:
        return "nothing was compared"
    first = rung.failures[0]
    if first.faults:
        return f"{first.name}: {first.faults[0]}{_blame(rung)}"
    off = f"{first.name} is off by {first.max_abs:.3g} at {first.worst_index}"
    return f"{off}, the tolerance is {rung.limit(first):g}{_blame(rung)}"


def _blame(rung: Rung) -> str:
    """The first step that is wrong by itself, else the first whose state is."""
    names = [comparison.name for comparison in rung.failures if comparison.name.startswith("state.")]
    steps = [name for name in names if name.endswith("teacher-forced")] or names
    return f"; the chain goes wrong at {steps[0]}" if steps and steps[0] != rung.failures[0].name else ""


def chunks(bundle: Bundle) -> Iterator[tuple[dict[str, NDArray[Any]], slice]]:
    """The golden inputs in batches that the graph takes, with the rows of the golden outputs they give."""
    golden, start = bundle.golden(), 0
    while start < golden.count:
        size = bundle.manifest.batch.next_chunk(golden.count - start)
        rows = slice(start, start + size)
        yield {name: take(name, array, rows) for name, array in golden.inputs.items()}, rows
        start += size


def take(name: str, array: NDArray[Any], rows: slice) -> NDArray[Any]:
    """The images ``rows`` of an input; those of ``step_noise`` lie on axis 1."""
    return np.ascontiguousarray(array[:, rows] if batch_axis(name) else array[rows])


def check_artefact(bundle: Bundle, runtime: Runtime, options: RunOptions) -> Rung:
    """Rung 6 of a bundle in ``runtime``, which must work here."""
    chain = None if runtime.unseen else runtime.open_chain(bundle, options)
    session = runtime.open(bundle, options)
    return replace(artefact_rung(bundle, session, chain, runtime.unseen), placement=placement_of(session))


def artefact_rung(bundle: Bundle, session: Session, chain: ChainSession | None, unseen: str = "") -> Rung:
    """Rung 6: the sample, then every state free-running and teacher-forced, on all golden noises.

    Without a ``chain`` the sample alone, and ``unseen`` says why.
    """
    golden = bundle.golden()
    parts = list(chunks(bundle))
    sample = np.concatenate([session.run(inputs)["sample"] for inputs, _ in parts])
    found = [compare("sample", sample, golden.sample)]
    if chain is not None:
        free = [chain.run_chain(inputs) for inputs, _ in parts]
        for k, expected in enumerate(golden.states, start=1):
            found.append(compare(f"state.{k}", _joined(free, f"state.{k}"), expected))
        for k, expected in enumerate(golden.states, start=1):
            forced = [chain.run_step(k, _known(inputs, golden.states, k, rows)) for inputs, rows in parts]
            found.append(compare(f"state.{k} teacher-forced", np.concatenate(forced), expected))
    uint8 = golden.sample.dtype == np.uint8
    return Rung(6, tuple(found), bundle.manifest.tolerance.atol, "", UINT8_LEVELS if uint8 else None, unseen)


def _joined(results: Sequence[dict[str, NDArray[Any]]], name: str) -> NDArray[Any]:
    return np.concatenate([result[name] for result in results])


def _known(
    inputs: dict[str, NDArray[Any]], states: Sequence[NDArray[np.float32]], k: int, rows: slice
) -> dict[str, NDArray[Any]]:
    """What step ``k`` may read: the graph's inputs and the reference states before it."""
    return inputs | {f"state.{j}": take("state", states[j - 1], rows) for j in range(1, k)}
