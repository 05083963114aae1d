"""``mmd-export bench``: bundles and baselines, interleaved in one run, and a gate on what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmd_export.baseline import Baseline
from mmd_export.bundle import Bundle
from mmd_export.commands.bench_gate import Gates, gate_plan, settled_gates
from mmd_export.commands.candidates import BenchOptions, Candidate, Checkpoints, candidates_of
from mmd_export.commands.cold import ColdStart, cold_start
from mmd_export.commands.verify import BUILT_IN
from mmd_export.errors import LatencyGateError, UsageError
from mmd_export.gate import GateVerdict, judge, measure_blocks
from mmd_export.latency import REST, LatencyReport, measure, require_rounds
from mmd_export.runtime import EventTimed, Placement

DEFAULT_BASELINES = ("torch", "per-step")
MIN_ROUNDS, MAX_ROUNDS = 10, 200
SECONDS = 30.0
BENCH_SCHEMA = 1


@dataclass(frozen=True)
class BenchReport:
    """``candidates``: the names of the bundles; all else in ``latency`` is a baseline.

    ``latency`` is at the first of ``batches``. ``artefacts``: SHA-256 of each candidate's. ``placements``: where the
    nodes of each ran, if its runtime can tell. ``bound``: the candidates copied nothing, the baselines did.
    ``device_seconds``: by the events of a GPU. ``baseline``: the ratio for later gates, if one was asked for.
    """

    latency: LatencyReport
    candidates: tuple[str, ...]
    artefacts: Mapping[str, str]
    batch: int
    placements: Mapping[str, Placement] = field(default_factory=dict)
    bound: bool = False
    runs_in: Mapping[str, str] = field(default_factory=dict)
    batches: Mapping[int, LatencyReport] = field(default_factory=dict)
    cold: Mapping[str, ColdStart] = field(default_factory=dict)
    device_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    verdicts: tuple[GateVerdict, ...] = ()
    baseline: Baseline | None = None

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the candidates are held against."""
        return tuple(name for name in self.latency.seconds if name not in self.candidates)

    def require(self) -> None:
        """Raise LatencyGateError on the first limit that is broken."""
        for verdict in self.verdicts:
            if verdict.failed:
                raise LatencyGateError(verdict.message)

    def throughput(self) -> list[dict[str, Any]]:
        """Images a second at every batch size, from the median with its interval."""
        rows = []
        for batch, latency in self.batches.items():
            for name in latency.seconds:
                median = latency.summary(name).percentile(50)
                if median is None:  # a single round
                    continue
                speeds = {"images_per_second": median.seconds, "low": median.high, "high": median.low}
                row = {key: None if seconds is None else batch / seconds for key, seconds in speeds.items()}
                rows.append({"batch": batch, "name": name, **row})
        return rows

    def to_dict(self) -> dict[str, Any]:
        places = {name: place.to_dict() for name, place in self.placements.items()}
        facts = {
            "candidates": list(self.candidates),
            "artefacts": dict(self.artefacts),
            "batch": self.batch,
            "bound": self.bound,
            "placements": places,
        }
        more = {
            "schema_version": BENCH_SCHEMA, "runs_in": dict(self.runs_in), "throughput": self.throughput(),
            "cold": {name: cold.to_dict() for name, cold in self.cold.items()},
            "device_seconds": {name: list(values) for name, values in self.device_seconds.items()},
            "gates": [verdict.to_dict() for verdict in self.verdicts],
        }  # fmt: skip
        return {**facts, **more, **self.latency.to_dict()}


def bench(
    options: BenchOptions, notify: Callable[[str], None] = lambda _: None, gates: Gates | None = None
) -> BenchReport:
    """Measure every bundle and every baseline in one interleaved run, at each batch size; with ``gates`` in blocks.

    What cannot be measured or compared is refused before anything is measured.
    """
    if options.rounds is not None:
        require_rounds(options.rounds, options.percentiles)
    bundles = [Bundle.open(path) for path in options.bundles]
    batches = _batches(bundles, options)
    if gates is not None:
        return _gated(bundles, batches, options, gates, notify)
    against = options.against or default_baselines(bundles[0], options)
    checkpoints = Checkpoints(options.checkpoint)
    if left_out := _left_out(bundles[0], against):
        notify(left_out)
    found: tuple[Candidate, ...] = ()
    seconds = SECONDS if options.seconds is None else options.seconds
    untimed = options.rounds is not None and options.seconds is None
    latencies: dict[int, LatencyReport] = {}
    devices: dict[str, tuple[float, ...]] = {}
    for batch in batches:
        notify(f"preparing {', '.join((*(each.name for each in bundles), *against))}, batch {batch}")
        found = candidates_of(bundles, against, batch, options, checkpoints)
        if batch == batches[0]:
            _tell(found, notify)
        calls = {each.name: each.open() for each in found}
        rounds = options.rounds or affordable_rounds(calls, seconds / len(batches))
        require_rounds(rounds, options.percentiles)
        notify(f"measuring {len(calls)} candidates, {rounds} interleaved rounds")
        latencies[batch] = measure(calls, rounds, rest=REST, seconds=math.inf if untimed else seconds / len(batches))
        if batch == batches[0]:
            devices = _device_seconds(calls, rounds)
    cold = _cold(found, batches[0], options, notify)
    return _report(bundles, found, latencies, options, cold=cold, device_seconds=devices)


def _report(
    bundles: Sequence[Bundle],
    found: Sequence[Candidate],
    latencies: Mapping[int, LatencyReport],
    options: BenchOptions,
    **more: Any,
) -> BenchReport:
    batch = next(iter(latencies))
    places = {each.name: each.placements[0] for each in found if each.placements}
    artefacts = {each.name: bundle.artefact_sha256 for each, bundle in zip(found, bundles, strict=False)}
    runs_in = {each.name: each.runs_in for each in found}
    return BenchReport(
        latencies[batch], tuple(artefacts), artefacts, batch, places, options.bound, runs_in, latencies, **more
    )


def _gated(
    bundles: Sequence[Bundle],
    batches: Sequence[int],
    options: BenchOptions,
    gates: Gates,
    notify: Callable[[str], None],
) -> BenchReport:
    """The gates' own measurement, in blocks; the first bundle is the one that is judged."""
    if options.bound:
        raise UsageError("--gate compares like with like; with --bound the bundles alone copy nothing; leave one out")
    if len(batches) > 1:
        raise UsageError(f"a gate is on one batch size, --batches names {len(batches)}; name one")
    if options.cold:
        raise UsageError(f"a gate starts no fresh processes, --cold is {options.cold}; leave it out, or the gate")
    if options.percentiles and options.rounds is None:
        raise UsageError("a gate makes as many rounds as it needs, which may be few; give --percentiles --rounds too")
    plan = gate_plan(options)
    found = candidates_of(bundles, gates.against(options), batches[0], options, Checkpoints(options.checkpoint))
    settled = settled_gates(gates, found, len(bundles), batches[0], options)
    _tell(found, notify)
    notify(f"measuring {len(found)} candidates in blocks, at most {plan.seconds:g} s")
    blocks = measure_blocks({each.name: each.open for each in found}, plan, settled.limits)
    verdicts = tuple(judge(limit, blocks) for limit in settled.limits)
    latencies, baseline = {batches[0]: blocks.latency()}, settled.measured(blocks)
    return _report(bundles, found, latencies, options, verdicts=verdicts, baseline=baseline)


def _batches(bundles: Sequence[Bundle], options: BenchOptions) -> tuple[int, ...]:
    """Those asked for, which every bundle must take, else the one of the first golden inputs."""
    first = bundles[0]
    batches = options.batches or (first.manifest.batch.next_chunk(first.golden().count),)
    for bundle in bundles:
        for batch in batches:
            bundle.manifest.batch.check(batch, bundle.name)
    return batches


def default_baselines(bundle: Bundle, options: BenchOptions) -> tuple[str, ...]:
    """torch eager and the per-step session where the checkpoint is at hand."""
    known = options.checkpoint is not None or bundle.manifest.checkpoint.name in BUILT_IN
    return DEFAULT_BASELINES if known else ()


def _left_out(bundle: Bundle, against: Sequence[str]) -> str:
    """Why nothing is measured beside the bundles, "" if something is."""
    if against:
        return ""
    name = bundle.manifest.checkpoint.name
    return f"torch and per-step are left out: the checkpoint {name!r} was not given; pass --checkpoint MODEL"


def _tell(found: Sequence[Candidate], notify: Callable[[str], None]) -> None:
    """What each candidate runs in."""
    for each in found:
        notify(each.told)


def affordable_rounds(run: Mapping[str, Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into ``seconds``, by one timed call of each after one to warm up."""
    cost = REST * len(run)
    for call in run.values():
        call()
        start = time.perf_counter()
        call()
        cost += time.perf_counter() - start
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / cost)))


def _device_seconds(calls: Mapping[str, object], rounds: int) -> dict[str, tuple[float, ...]]:
    """By events, of what can be timed so: engines that are bound."""
    timed = {name: call for name, call in calls.items() if isinstance(call, EventTimed)}
    return {name: tuple(call.device_seconds() for _ in range(rounds)) for name, call in timed.items()}


def _cold(
    found: Sequence[Candidate], batch: int, options: BenchOptions, notify: Callable[[str], None]
) -> dict[str, ColdStart]:
    """Of everything that is a bundle; the torch reference, which reads a checkpoint, is not one."""
    able = [each for each in found if each.bundle is not None and each.runtime != "torch"]
    if options.cold and able:
        notify(f"starting {options.cold * len(able)} fresh processes")
    return {each.name: cold_start(each, batch, options.cold, options.threads) for each in able if options.cold}
