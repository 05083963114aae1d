"""``mmd-export bench`` and ``mmd-export report``: measure, gate, and put the numbers on one page."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mmd_export.batch import BatchSpec
from mmd_export.cli_options import (
    CheckpointOption,
    JsonFile,
    JunitFile,
    RuntimeName,
    SummaryFile,
    at_least,
    can_be_written,
    positive,
)
from mmd_export.cli_output import as_json, say, show, show_table, write_json
from mmd_export.errors import UsageError
from mmd_export.folders import write_text

BENCH_EXAMPLES = "Example: mmd-export bench new.bundle --against old.bundle --max-regression 5%"
REPORT_EXAMPLES = "Example: mmd-export report digits-5.bundle -o report.html"
_GATE_PANEL = "Gate"
_MOST_THREADS_A_CORE = 4  # more only wait for each other, and a thousand of them never end


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="bundle folders", show_default=False)],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="torch (eager), torch-compile, diffusers (its pipeline), per-step, a runtime, BUNDLE or "
            "BUNDLE@RUNTIME; repeatable",
            show_default=False,
        ),
    ] = None,
    runtime: RuntimeName = None,
    checkpoint: CheckpointOption = None,
    rounds: Annotated[
        int | None, typer.Option(help="interleaved rounds; default: as many as fit", show_default=False)
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="without --rounds: time to spend; default 30, a gate at most 45", show_default=False),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads a run; 0: each library's choice")] = 0,
    batches: Annotated[
        str | None, typer.Option(help="batch sizes to measure, as in 1,4,8; the bundle takes them", show_default=False)
    ] = None,
    percentiles: Annotated[
        str | None,
        typer.Option(
            help="percentiles that must be had, as in 50,90,99; too few rounds are refused", show_default=False
        ),
    ] = None,
    cold: Annotated[
        int | None,
        typer.Option(
            help="fresh processes of each bundle for cold load and memory; default 1, with a gate none",
            show_default=False,
        ),
    ] = None,
    bound: Annotated[
        bool, typer.Option("--bound", help="keep inputs and outputs on the device, where the runtime can")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="record the bundles' runs on the GPU once and replay them")
    ] = False,
    gate: Annotated[
        Path | None,
        typer.Option(
            help="baseline (--save-baseline) or limits; exit 6 on a regression",
            show_default=False,
            rich_help_panel=_GATE_PANEL,
        ),
    ] = None,
    max_regression: Annotated[
        str | None,
        typer.Option(
            help="how much slower than the baseline, or without --gate than --against; default 5%",
            show_default=False,
            rich_help_panel=_GATE_PANEL,
        ),
    ] = None,
    save_baseline: Annotated[
        Path | None,
        typer.Option(
            help="write the ratio to the first --against, for later gates",
            show_default=False,
            callback=can_be_written,
            rich_help_panel=_GATE_PANEL,
        ),
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="write the result into the bundle's model card")
    ] = False,
    junit: JunitFile = None,
    summary: SummaryFile = None,
    json: JsonFile = None,
) -> None:
    """Measure latency, interleaved with torch eager and with the usual one-step session called K times.

    Both take the checkpoint: --checkpoint, where it is not built in.
    """
    from mmd_export import ci_files
    from mmd_export.commands import bench as command
    from mmd_export.commands.bench_gate import Gates
    from mmd_export.commands.candidates import BenchOptions
    from mmd_export.commands.cards import write_latency

    _require_counts(rounds, seconds, threads, cold)
    gates = Gates.of(gate, max_regression, save_baseline)
    fresh = (1 if gates is None else 0) if cold is None else cold
    options = BenchOptions(
        tuple(bundles), tuple(against or ()), runtime, checkpoint, rounds, seconds, threads, bound,
        _sizes(batches), _percentiles(percentiles), fresh, cuda_graph,
    )  # fmt: skip
    report = command.bench(options, say, gates)
    numbers = report.to_dict()
    _show_bench(numbers, json)
    for name, placement in report.placements.items():
        say(f"{name}: {placement.summary}")
    for note in report.latency.notes:
        say(note)
    write_json(json, numbers)
    suite = f"mmd-export bench {report.candidates[0]}"
    ci_files.write_ci_files(junit, summary, suite, ci_files.bench_cases(numbers), ci_files.bench_summary(numbers))
    if save_baseline is not None and report.baseline is not None:
        write_text(save_baseline, as_json(report.baseline.to_dict()), "--save-baseline")
    if update_card:
        write_latency(bundles[0], numbers)
    tell = say if json == Path("-") else show
    for verdict in report.verdicts:
        tell(f"gate {verdict.message}")
    report.require()


def _show_bench(numbers: dict[str, Any], json: Path | None) -> None:
    """Every table that has rows."""
    from mmd_export import numbers as rows

    title = f"Latency, batch {numbers['batch']}, {numbers['rounds']} rounds, [95 %]"
    heads = (*rows.LATENCY_HEADS[:-1], f"times {rows.first_candidate(numbers)}")
    show_table(title, heads, rows.latency_rows(numbers), json)
    if len({row["batch"] for row in numbers["throughput"]}) > 1:
        show_table("Throughput", rows.THROUGHPUT_HEADS, rows.throughput_rows(numbers), json)
    if numbers["cold"]:
        show_table("Fresh processes", rows.COLD_HEADS, rows.cold_rows(numbers), json)


def report(
    bundles: Annotated[list[Path], typer.Argument(help="bundle folders", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write", callback=can_be_written)] = Path(
        "report.html"
    ),
    verify: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of verify, one a bundle, instead of verifying now", show_default=False),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="JSON of bench, instead of measuring now", show_default=False)
    ] = None,
    runtime: RuntimeName = None,
    checkpoint: CheckpointOption = None,
    seconds: Annotated[float, typer.Option(help="time to spend on latency; 0: none is measured")] = 10.0,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="write the same numbers into each bundle's model card")
    ] = False,
) -> None:
    """One page with pictures, parity, latency and provenance; it loads nothing from anywhere."""
    from mmd_export.commands.report import ReportOptions
    from mmd_export.commands.report import report as make

    at_least("--seconds", seconds, 0)
    options = ReportOptions(tuple(bundles), out, tuple(verify or ()), bench, runtime, checkpoint, seconds, update_card)
    make(options, say)
    show(f"{out}: {out.stat().st_size / 1e3:.0f} kB, {len(bundles)} bundles")


def _require_counts(rounds: int | None, seconds: float | None, threads: int, cold: int | None) -> None:
    """Raise UsageError for what is no number of rounds, seconds, threads or processes."""
    positive("--rounds", rounds)
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds is {seconds:g}; it must be above 0, or leave it out")
    at_least("--threads", threads, 0)
    at_least("--cold", cold or 0, 0)
    cores = os.cpu_count() or 1
    if threads > (most := cores * _MOST_THREADS_A_CORE):
        raise UsageError(f"--threads is {threads}, this machine has {cores} cores; give at most {most}")


def _sizes(text: str | None) -> tuple[int, ...]:
    """``--batches``."""
    if text is None:
        return ()
    try:
        sizes = BatchSpec.parse(text).sizes
    except UsageError:
        sizes = None
    if sizes is None:
        raise UsageError(f"--batches is {text!r}; give sizes to measure, such as 1,4,8")
    return sizes


def _percentiles(text: str | None) -> tuple[float, ...]:
    """``--percentiles``."""
    if text is None:
        return ()
    from mmd_export.latency import require_reported

    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--percentiles is {text!r}; give a list such as 50,90,99") from None
    require_reported(found)
    return found
