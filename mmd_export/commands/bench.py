"""``mmd-export bench``: bundles and baselines, interleaved in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mmd_export.bundle import Bundle, update_card
from mmd_export.card import model_card
from mmd_export.commands.verify import BUILT_IN, usable_runtime
from mmd_export.errors import LatencyGateError, MmdExportError, NotAvailableError, UsageError
from mmd_export.latency import GateVerdict, LatencyReport, gate, measure
from mmd_export.parity import chunks
from mmd_export.runtime import BindingSession, Placement, RunOptions, placement_of
from mmd_runtime.registry import runtime_names

BASELINES = ("torch", "per-step")
MIN_ROUNDS, MAX_ROUNDS = 10, 200
NOT_TIMED = {"coreml-reference": "reference evaluation says nothing of the speed of Core ML; bench it on macOS"}

Inputs = dict[str, NDArray[Any]]
Prepared = tuple[Callable[[], object], Placement | None]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    ``rounds`` None: as many as fit into ``seconds``, between 10 and 200. ``threads`` 0: each library's choice.
    ``bound``: inputs and outputs stay on the device, so that a run copies nothing.
    """

    bundles: tuple[Path, ...]
    against: tuple[str, ...] = ()
    runtime: str | None = None
    checkpoint: str | None = None
    rounds: int | None = None
    seconds: float = 30.0
    threads: int = 0
    bound: bool = False


@dataclass(frozen=True)
class BenchReport:
    """``candidates``: the names of the bundles; all else in ``latency`` is a baseline.

    ``placements``: where the nodes of each ran, if its runtime can tell. ``bound``: the candidates copied nothing, the
    baselines did.
    """

    latency: LatencyReport
    candidates: tuple[str, ...]
    batch: int
    placements: Mapping[str, Placement] = field(default_factory=dict)
    bound: bool = False

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the candidates are held against."""
        return tuple(name for name in self.latency.seconds if name not in self.candidates)

    def to_dict(self) -> dict[str, Any]:
        places = {name: place.to_dict() for name, place in self.placements.items()}
        facts = {"candidates": list(self.candidates), "batch": self.batch, "bound": self.bound, "placements": places}
        return {**facts, **self.latency.to_dict()}


def bench(options: BenchOptions, notify: Callable[[str], None] = lambda _: None) -> BenchReport:
    """Measure every bundle and every baseline on the first golden inputs, in one interleaved run."""
    bundles = [Bundle.open(path) for path in options.bundles]
    first = bundles[0]
    inputs, _ = next(chunks(first))
    run: dict[str, Callable[[], object]] = {}
    places: dict[str, Placement | None] = {}
    for bundle in bundles:
        name = _free_name(bundle, run)
        run[name], places[name] = _bundle_call(bundle, inputs, options)
    candidates = tuple(run)
    for against in options.against or default_baselines(first, options):
        notify(f"preparing {against}")
        name = _free_name_of(against, run)
        run[name], places[name] = _baseline(against, first, inputs, options)
    known = {name: place for name, place in places.items() if place is not None}
    rounds = options.rounds or affordable_rounds(run, options.seconds)
    notify(f"measuring {len(run)} candidates, {rounds} interleaved rounds")
    return BenchReport(measure(run, rounds), candidates, len(inputs["noise"]), known, options.bound)


def default_baselines(bundle: Bundle, options: BenchOptions) -> tuple[str, ...]:
    """torch eager and the per-step session where the checkpoint is at hand."""
    known = options.checkpoint is not None or bundle.manifest.checkpoint.name in BUILT_IN
    return BASELINES if known else ()


def affordable_rounds(run: dict[str, Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into ``seconds``, by one timed call of each after one to warm up."""
    cost = 0.0
    for call in run.values():
        call()
        start = time.perf_counter()
        call()
        cost += time.perf_counter() - start
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(cost, 1e-6))))


def _bundle_call(bundle: Bundle, inputs: Inputs, options: BenchOptions) -> Prepared:
    runtime = usable_runtime(bundle, options.runtime)
    if reason := NOT_TIMED.get(runtime.name):
        raise NotAvailableError(f"bundle {bundle.name}: runtime {runtime.name} is not timed: {reason}")
    session = runtime.open(bundle, RunOptions(options.threads, options.checkpoint))
    if not options.bound:
        return lambda: session.run(inputs), placement_of(session)
    if not isinstance(session, BindingSession):
        raise NotAvailableError(f"runtime {runtime.name} keeps no inputs on the device; leave out --bound")
    return session.bind(inputs), placement_of(session)


def _baseline(name: str, bundle: Bundle, inputs: Inputs, options: BenchOptions) -> Prepared:
    """Another way to run the first bundle, or another bundle; ``--bound`` is for the bundles themselves."""
    if name == "per-step":
        return _per_step(bundle, inputs, options), None
    if name.partition(":")[0] in runtime_names():
        return _bundle_call(bundle, inputs, replace(options, runtime=name, bound=False))
    if not Path(name).is_dir():
        raise UsageError(f"--against {name!r} is neither {' nor '.join(BASELINES)} nor a runtime nor a bundle")
    return _bundle_call(Bundle.open(name), inputs, replace(options, bound=False))


def _per_step(bundle: Bundle, inputs: Inputs, options: BenchOptions) -> Callable[[], object]:
    from mmd_export.checkpoint import load_matching
    from mmd_export.plan import StepPlan
    from mmd_export.step_session import per_step_session

    wanted = bundle.manifest.checkpoint
    if options.checkpoint is None and wanted.name not in BUILT_IN:
        raise UsageError(f"--against per-step needs the checkpoint {wanted.name!r}; pass --checkpoint MODEL")
    checkpoint = load_matching(options.checkpoint or wanted.name, wanted)
    plan = StepPlan.from_dict(bundle.manifest.plan)
    sample = per_step_session(checkpoint, plan, len(inputs["noise"]), options.threads)
    return lambda: sample(inputs)


def _free_name(bundle: Bundle, taken: dict[str, Callable[[], object]]) -> str:
    return _free_name_of(bundle.name, taken)


def _free_name_of(name: str, taken: dict[str, Callable[[], object]]) -> str:
    """The last part of a path, numbered if it is taken."""
    short = Path(name).name or name
    free = next(i for i in range(1, len(taken) + 2) if (short if i == 1 else f"{short} ({i})") not in taken)
    return short if free == 1 else f"{short} ({free})"


def check_gates(report: BenchReport, path: Path) -> list[GateVerdict]:
    """Judge the limits of a gate file on the ratios measured now; raises LatencyGateError on the first that is broken.

    The file is ``{"gates": [{"against": "torch", "max_ratio": 0.5}]}``: the first bundle may take at most so many times
    the time of the other.
    """
    if report.bound:
        raise UsageError("--gate compares like with like; with --bound the bundles alone copy nothing; leave one out")
    verdicts = [
        gate(report.latency, report.candidates[0], against, max_ratio - 1.0)
        for against, max_ratio in _read_gates(path, report)
    ]
    for verdict in verdicts:
        if verdict.failed:
            raise LatencyGateError(verdict.message)
    return verdicts


def _read_gates(path: Path, report: BenchReport) -> list[tuple[str, float]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [(str(row["against"]), float(row["max_ratio"])) for row in data["gates"]]
    except OSError as error:
        raise UsageError(f"--gate {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        example = '{"gates": [{"against": "torch", "max_ratio": 0.5}]}'
        raise UsageError(f"--gate {path} is not of the form {example}: {type(error).__name__} {error}") from error
    for against, _ in rows:
        if against not in report.latency.seconds:
            known = ", ".join(report.latency.seconds)
            raise UsageError(f"--gate {path} names {against!r}; measured were {known}; add --against {against}")
    return rows


def write_card(folder: Path, report: BenchReport) -> None:
    """Put the measured latency into the bundle's model card and seal it again."""
    bundle = Bundle.open(folder)
    if bundle.name not in report.candidates:
        raise MmdExportError(f"bundle {bundle.name} was not measured; measured were {', '.join(report.candidates)}")
    card = bundle.card
    verified = next((line for line in card.splitlines() if line.startswith("Largest absolute error")), "")
    where = verified.removeprefix("Largest absolute error, rounded up; ").split(". Tolerance")[0]
    update_card(bundle, model_card(bundle.manifest, where or "not verified", latency_table(report)))


def latency_table(report: BenchReport) -> str:
    """Markdown: medians, and the ratio of every baseline to the first candidate with its 95 % interval."""
    environment, first = report.latency.environment, report.candidates[0]
    rows = []
    for name in report.latency.seconds:
        summary = report.latency.summary(name)
        ratio = "1" if name == first else _ratio_text(report.latency, name, first)
        rows.append(f"| {name} | {summary.median * 1e3:.2f} | {ratio} |")
    bound = " Inputs and outputs of the bundles stay on the device, the others copy theirs." if report.bound else ""
    head = f"Batch {report.batch}, {report.latency.rounds} interleaved rounds, {environment.get('cpu', 'CPU')}.{bound}"
    return "\n".join([head, "", f"| | median ms | times {first} |", "|---|---|---|", *rows])


def _ratio_text(latency: LatencyReport, name: str, against: str) -> str:
    ratio = latency.ratio(name, against)
    interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.median:.2f}{interval}"


def summary_rows(report: BenchReport) -> Sequence[tuple[str, str, str, str, str]]:
    """Name, median, p90, p99 in ms, ratio to the first candidate; as text, for the terminal."""
    first, rows = report.candidates[0], []
    for name in report.latency.seconds:
        summary = report.latency.summary(name)
        percentiles = ["-" if value is None else f"{value * 1e3:.2f}" for value in (summary.p90, summary.p99)]
        ratio = "1" if name == first else _ratio_text(report.latency, name, first)
        rows.append((name, f"{summary.median * 1e3:.2f}", *percentiles, ratio))
    return [(a, b, c, d, e) for a, b, c, d, e in rows]
