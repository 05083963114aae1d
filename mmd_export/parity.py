"""Parity: measure, then judge. Functions return numbers, verdicts are properties. No torch.

The ladder's rungs are numbered as in the documentation; this file holds rung 6, which needs nothing but a bundle and a
runtime. Rungs 1 to 5 need the checkpoint, ``mmd_export.ladder``; rung 7 many samples, ``mmd_export.distribution``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle, Golden, take
from mmd_export.comparison import FORCED, FRESH, NO_LIMITS, Comparison, Limits, compare
from mmd_export.error_budget import ErrorBudget, error_budget
from mmd_export.errors import UsageError
from mmd_export.parity_report import RUNGS, Coverage, Culprit, ParityReport, Rung
from mmd_export.runtime import ChainSession, RunOptions, Runtime, Session, placement_of, runs_whole
from mmd_export.tolerance import mean_tolerance, uint8_tolerance

__all__ = [
    "RUNGS",
    "Comparison",
    "Coverage",
    "Culprit",
    "Limits",
    "ParityReport",
    "Rung",
    "artefact_rung",
    "check_artefact",
    "chunks",
    "compare",
    "require_outputs",
]


def chunks(bundle: Bundle, golden: Golden | None = None) -> Iterator[tuple[dict[str, NDArray[Any]], slice]]:
    """The golden inputs in batches that the graph takes, with the rows of the golden outputs they give."""
    golden = golden or bundle.golden()
    start = 0
    while start < golden.count:
        size = bundle.manifest.batch.next_chunk(golden.count - start)
        rows = slice(start, start + size)
        yield {name: take(name, array, rows) for name, array in golden.inputs.items()}, rows
        start += size


def check_artefact(
    bundle: Bundle, runtime: Runtime, options: RunOptions, limits: Limits | None = None, fresh: Golden | None = None
) -> Rung:
    """Rung 6 of a bundle in ``runtime``, which must work here; ``fresh``: on these noises too."""
    require_outputs(bundle, limits)
    chain = None if runtime.unseen else runtime.open_chain(bundle, options)
    session = None if runs_whole(chain) else runtime.open(bundle, options)
    rung = artefact_rung(bundle, session, chain, runtime.unseen, limits, fresh)
    return replace(rung, placement=None if session is None else placement_of(session))


def require_outputs(bundle: Bundle, limits: Limits | None) -> None:
    """Raise UsageError for a tolerance of something that is not compared."""
    known = ["sample", *(f"state.{k}" for k in range(1, bundle.golden().steps + 1))]
    for flag, values in (("--atol", limits.atol), ("--rtol", limits.rtol)) if limits else ():
        if unknown := sorted(set(values) - {"", *known}):
            raise UsageError(f"{flag} names {unknown[0]!r}, bundle {bundle.name} compares {', '.join(known)}")


def artefact_rung(
    bundle: Bundle,
    session: Session | None,
    chain: ChainSession | None,
    unseen: str = "",
    limits: Limits | None = None,
    fresh: Golden | None = None,
) -> Rung:
    """Rung 6: the sample, then every state free-running and teacher-forced, on all golden noises, then on fresh ones.

    Without a ``chain`` the sample alone, and ``unseen`` says why; without a ``session`` the sample is the chain's.
    """
    limits = limits or NO_LIMITS
    golden, atol = bundle.golden(), bundle.manifest.tolerance.atol
    seen, *again = _seen(bundle, session, chain, [golden] if fresh is None else [golden, fresh])
    found = list(_compared(seen, golden, limits))
    states = [f"state.{k}" for k in range(1, golden.steps + 1)]
    tolerances = [(limits.atol_of(state, atol), limits.rtol_of(state)) for state in states]
    budget = _budget(golden, seen, tolerances, "golden")
    if fresh is not None:
        found += _compared(again[0], fresh, limits, FRESH)
        if budget is not None and budget.first_step is None:  # what fresh noises alone show is worth more
            other = _budget(fresh, again[0], tolerances, "fresh")
            budget = other if other is not None and other.first_step is not None else budget
    levels, mean = uint8_tolerance(atol) if golden.sample.dtype == np.uint8 else (None, np.inf)
    return Rung(
        6, tuple(found), atol, "", levels, unseen, None, mean, mean_tolerance(atol), limits, (), budget,
        _coverage(bundle, chain is not None),
    )  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """What the artefact gave: the sample, and each state after step 1 .. K by itself and from the reference states."""

    sample: NDArray[Any]
    free: tuple[NDArray[Any], ...] = ()
    forced: tuple[NDArray[Any], ...] = ()


def _seen(bundle: Bundle, session: Session | None, chain: ChainSession | None, noises: Sequence[Golden]) -> list[_Seen]:
    """What the artefact gives on each; all whole runs come first, as a chain may drop its whole graph for a step's."""
    found = []
    for golden in noises:
        parts = [inputs for inputs, _ in chunks(bundle, golden)]
        runs = [] if chain is None else [chain.run_chain(inputs) for inputs in parts]
        whole = runs if session is None else [session.run(inputs) for inputs in parts]
        steps = range(1, golden.steps + 1) if runs else ()
        free = tuple(np.concatenate([run[f"state.{k}"] for run in runs]) for k in steps)
        found.append(_Seen(np.concatenate([run["sample"] for run in whole]), free))
    if chain is None:
        return found
    return [replace(seen, forced=_forced(bundle, chain, golden)) for seen, golden in zip(found, noises, strict=True)]


def _forced(bundle: Bundle, chain: ChainSession, golden: Golden) -> tuple[NDArray[Any], ...]:
    """Each state from the reference's one before."""
    parts = list(chunks(bundle, golden))
    return tuple(
        np.concatenate([chain.run_step(k, _known(inputs, golden.states, k, rows)) for inputs, rows in parts])
        for k in range(1, golden.steps + 1)
    )


def _compared(run: _Seen, golden: Golden, limits: Limits, prefix: str = "") -> Iterator[Comparison]:
    yield compare(f"{prefix}sample", run.sample, golden.sample, rtol=limits.rtol_of("sample"))
    for states, how in ((run.free, ""), (run.forced, FORCED)):
        for k, state in enumerate(states, start=1):
            name = f"state.{k}"
            yield compare(f"{prefix}{name}{how}", state, golden.states[k - 1], rtol=limits.rtol_of(name))


def _budget(golden: Golden, run: _Seen, tolerances: Sequence[tuple[float, float]], noises: str) -> ErrorBudget | None:
    shapes = {state.shape for state in (*golden.states, *run.free, *run.forced)}
    if not run.free or len(shapes) > 1:  # a state of another shape has failed already
        return None
    return error_budget(golden.noise, golden.states, run.free, run.forced, tolerances, noises)


def _coverage(bundle: Bundle, states: bool) -> Coverage:
    golden, batch = bundle.golden(), bundle.manifest.batch
    steps, inputs = golden.steps, len(bundle.manifest.inputs)
    sizes = {rows.stop - rows.start for _, rows in chunks(bundle)}
    of = len(batch.sizes) if batch.sizes is not None else batch.largest - batch.smallest + 1
    compared = (steps if states else 0, steps)
    return Coverage((1, 1), compared, compared, (inputs, inputs), (len(sizes), of))


def _known(
    inputs: dict[str, NDArray[Any]], states: Sequence[NDArray[np.float32]], k: int, rows: slice
) -> dict[str, NDArray[Any]]:
    """What step ``k`` may read: the graph's inputs and the reference states before it."""
    return inputs | {f"state.{j}": take("state", states[j - 1], rows) for j in range(1, k)}
