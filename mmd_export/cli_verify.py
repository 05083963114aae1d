"""``mmd-export verify``, which has many options; registered in ``cli``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmd_export.cli_options import BundleFolder, CheckpointOption, JsonFile, JunitFile, RuntimeName, SummaryFile
from mmd_export.cli_output import say, show_table, write_json
from mmd_export.errors import UsageError

if TYPE_CHECKING:
    from mmd_export.commands.distribution import DistributionOptions
    from mmd_export.parity import ParityReport

VERIFY_EXAMPLES = (
    "Example: mmd-export verify digits-5.bundle --json parity.json\n\n"
    "Everything: mmd-export verify digits-5.bundle --checkpoint digits --distribution --bisect"
)


def verify(
    bundle: BundleFolder,
    runtime: RuntimeName = None,
    checkpoint: CheckpointOption = None,
    atol: Annotated[
        list[str] | None,
        typer.Option(
            help=r"\[output:]value instead of the bundle's tolerance, as in sample:1e-3; repeatable", show_default=False
        ),
    ] = None,
    rtol: Annotated[
        list[str] | None,
        typer.Option(help=r"\[output:]value: so much of each reference value besides; repeatable", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="of the fresh noises, with --checkpoint; default 1", show_default=False)
    ] = None,
    distribution: Annotated[
        bool, typer.Option("--distribution", help="rung 7 too: many samples, MMD with a p-value, Frechet distance")
    ] = False,
    count: Annotated[int | None, typer.Option(help="rung 7: samples; default 2000", show_default=False)] = None,
    features: Annotated[
        str | None,
        typer.Option(help="rung 7: projection (default), pixels, or an encoder of finetune", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="rung 7: a bundle that stands for the reference, without torch", show_default=False),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="rung 7: false alarms allowed; default 0.01", show_default=False)
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="name the step, block and operator at fault; needs --checkpoint")
    ] = False,
    json: JsonFile = None,
    junit: JunitFile = None,
    summary: SummaryFile = None,
) -> None:
    """Check the artefact against the float64 reference, after every step. Exit 4 when it fails.

    The golden file in the bundle is enough; --checkpoint adds rungs 1 to 5 and noises that it does not hold.
    """
    from mmd_export import ci_files
    from mmd_export.bundle import Bundle
    from mmd_export.commands.verify import FRESH_SEED
    from mmd_export.commands.verify import verify as check
    from mmd_export.comparison import Limits

    if seed is not None and checkpoint is None:
        raise UsageError(
            f"--seed {seed} is of fresh noises, which need the checkpoint; add --checkpoint or leave it out"
        )
    limits = Limits(parse_limits("--atol", atol or ()), parse_limits("--rtol", rtol or ()))
    given = {"count": count, "features": features, "against": None if against is None else str(against), "level": level}
    report = check(
        Bundle.open(bundle), runtime, checkpoint, say, limits=limits, seed=FRESH_SEED if seed is None else seed,
        distribution=_options(distribution, given), bisect=bisect,
    )  # fmt: skip
    show_report(report, json)
    numbers, suite = report.to_dict(), f"mmd-export verify {report.bundle}"
    write_json(json, numbers)
    ci_files.write_ci_files(junit, summary, suite, ci_files.verify_cases(numbers), ci_files.verify_summary(numbers))
    report.require()


def parse_limits(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """``[output:]value`` ... by output, "" for all others; raises UsageError for what is no tolerance."""
    found: dict[str, float] = {}
    for text in texts:
        output, _, number = text.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            raise UsageError(
                f"{flag} {text!r}: {number!r} is no number; write [output:]value, as in sample:1e-3"
            ) from None
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"{flag} {text!r}: a tolerance is finite and not below 0, this is {value:g}")
        if output in found:
            raise UsageError(
                f"{flag} gives {output or 'the default'} twice, {found[output]:g} and {value:g}; leave one out"
            )
        found[output] = value
    return found


def _options(wanted: bool, given: Mapping[str, object]) -> DistributionOptions | None:
    from mmd_export.commands.distribution import DistributionOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and not wanted:
        raise UsageError(f"--{next(iter(chosen))} belongs to rung 7; add --distribution")
    return DistributionOptions(**chosen) if wanted else None  # type: ignore[arg-type]  # by name, as typer typed them


def show_report(report: ParityReport, json: Path | None) -> None:
    """The ladder, the budget of the steps, what was compared and what was not."""
    heads: tuple[str, ...] = ("rung", "checks", "worst", "would pass at", "tolerance", "verdict")
    show_table(f"Parity of {report.bundle} in {report.runtime}", heads, rung_rows(report), json)
    if report.artefact is not None and report.artefact.budget is not None:
        heads = ("step", "error", "local", "inherited", "growth", "gain", "sampler's own")
        show_table("Error over the steps: error = local + inherited, largest of each", heads, budget_rows(report), json)
    say(f"{report.runtime}: {report.detail}")
    say(f"compared {report.verified_fraction:.0%} of the artefact's outputs, states, steps, inputs and batch sizes")
    for line in report.not_checked:
        say(f"not checked: {line}")
    for placement in (rung.placement for rung in report.rungs if rung.placement):
        say(placement.summary)
    if report.culprit is not None:
        say(f"bisect: {report.culprit.message}")
    if report.passed:
        say(f"passed: {sum(not rung.skipped for rung in report.rungs)} of {len(report.rungs)} rungs checked")


def rung_rows(report: ParityReport) -> Iterator[tuple[str, ...]]:
    """One rung a row; each test of rung 7 has its own."""
    for rung in report.rungs:
        start, verdict = (str(rung.number), rung.title), rung.verdict
        for test in rung.tests:
            numbers = f"MMD^2 {test.mmd2:.1e}, Frechet {test.frechet:.2g}"
            title = f"{rung.title}, {test.noise} noise, {test.features}: {numbers}"
            tolerance = f"p > {test.level:g}"
            if test.tolerated is not None:
                tolerance += f" or MMD^2 <= {test.tolerated:.1e}"
            verdict = "passed" if test.passed else "failed"
            yield (str(rung.number), title, f"p {test.p_value:.3f}", "", tolerance, verdict)
        if rung.skipped:
            yield (*start, "-", "-", f"{rung.atol:g}" if rung.atol else "-", verdict)
        elif not rung.tests:
            required = rung.required_atol
            passes_at = "-" if required is None else f"{required:.1e}" if math.isfinite(required) else "none"
            worst = "-" if required is None else f"{rung.worst:.1e}"
            yield (*start, worst, passes_at, f"{_tolerance(rung.limits.atol, rung.atol)}", verdict)


def _tolerance(given: object, default: float) -> str:
    return f"{default:g}" if not given else "as given"


def budget_rows(report: ParityReport) -> Iterator[tuple[str, ...]]:
    """One step a row."""
    assert report.artefact is not None
    assert report.artefact.budget is not None
    for each in report.artefact.budget.steps:
        errors = (f"{size:.1e}" for size in (each.total_max, each.local_max, each.inherited_max))
        factors = ("-" if f is None else f"{f:.2f}" for f in (each.growth, each.gain, each.amplification))
        yield (str(each.step), *errors, *factors)
