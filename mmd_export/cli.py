"""The command line: options in, one function of ``mmd_export.commands`` or ``build`` called, its value printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmd_export import __version__
from mmd_export.cli_bench import BENCH_EXAMPLES, REPORT_EXAMPLES, bench, report
from mmd_export.cli_build import BUILD_EXAMPLES, FINALIZE_EXAMPLES, build, finalize
from mmd_export.cli_embed import EMBED_EXAMPLES, embed
from mmd_export.cli_errors import broken_line, missing_line, usage_line
from mmd_export.cli_evaluate import EVALUATE_EXAMPLE, evaluate
from mmd_export.cli_finetune import FINETUNE_EXAMPLES, finetune
from mmd_export.cli_network import Conditions, GuidanceForm, GuidanceScale, NullLabel, TextLength
from mmd_export.cli_options import (
    CheckpointOption,
    Ema,
    Eta,
    JsonFile,
    Overwrite,
    RuntimeName,
    Sampler,
    Source,
    Spacing,
    Steps,
    Timesteps,
    TorchDevice,
    can_be_written,
    listed,
    png,
    with_ema,
)  # fmt: skip
from mmd_export.cli_output import counted, say, short, show, show_table, write_json
from mmd_export.cli_verify import VERIFY_EXAMPLES, verify
from mmd_export.errors import MmdExportError, NotAvailableError, UsageError, is_out_of_memory
from mmd_export.journal import JOURNAL
from mmd_export.network_options import NetworkOptions
from mmd_export.plan_options import PlanOptions
from mmd_export.supervisor import TRACEBACK, supervise

INTERRUPTED = 130

app = typer.Typer(
    name="mmd-export",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Few-step diffusion samplers as single static graphs: tune with MMD, export, check, measure.\n\n"
    "Start with mmd-export demo. Exit codes: 0 done, 1 unexpected, 2 usage, 3 not available here, "
    "4 parity failed, 5 bundle damaged, 6 latency gate failed, 130 interrupted.",
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"mmd-export {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """What stands before the command; the help is that of ``app``."""


@app.command(epilog="Example: mmd-export demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="folder to make")] = Path("mmd-demo"),
    overwrite: Overwrite = False,
    iterations: Annotated[
        int | None, typer.Option(help="tuning iterations; fewer is faster and worse", show_default=False)
    ] = None,
) -> None:
    """The main job on the built-in digits: tune, build, verify, bench, sample. A few minutes on 2 cores."""
    from mmd_export.commands.demo import run_demo
    from mmd_finetune.progress import ProgressBar

    result = run_demo(out, overwrite=overwrite, iterations=iterations, notify=say, bar=ProgressBar)
    show_table("Frechet distance, held-out encoder (lower is better)", ("sampler", "distance"), result.quality_rows)
    show_table("Latency, batch 1, one interleaved run", ("", "median ms", "times the one graph"), result.latency_rows)
    show(result.summary)


app.command(epilog=FINETUNE_EXAMPLES)(finetune)
app.command(epilog=BUILD_EXAMPLES)(build)
app.command(epilog=FINALIZE_EXAMPLES)(finalize)
app.command(epilog=EMBED_EXAMPLES)(embed)


app.command(epilog=VERIFY_EXAMPLES)(verify)


app.command(epilog=BENCH_EXAMPLES)(bench)
app.command(epilog=REPORT_EXAMPLES)(report)


@app.command(epilog="Example: mmd-export sample digits-5.bundle --seed 7 --count 64 --out grid.png")
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="PNG file to write", callback=can_be_written)] = Path("grid.png"),
    seed: Annotated[int, typer.Option(help="image i of a seed is the same everywhere")] = 0,
    count: Annotated[int, typer.Option(help="how many images")] = 16,
    runtime: RuntimeName = None,
    device: TorchDevice = None,
    checkpoint: CheckpointOption = None,
    class_label: Annotated[int | None, typer.Option(help="for class-conditional models", show_default=False)] = None,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    condition: Conditions = None,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
) -> None:
    """Draw images from a seed and write them as one PNG grid.

    A latent model is decoded by the vae/ of its folder; a bundle of one must have been built with --decode.
    """
    from mmd_export.commands.sample import SampleOptions, draw
    from mmd_export.pictures import save_grid

    png("--out", out)
    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    options = SampleOptions(
        with_ema(source, ema), seed, count, runtime, checkpoint, class_label, network, tuple(condition or ()), device,
        steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps),
    )  # fmt: skip
    drawing = draw(options)
    with counted() as observe:
        images = drawing.images(lambda done: observe("drawing", done, count))
    save_grid(images, out)
    show(f"{out}: {count} images of seed {seed}")
    say(f"drawn in {drawing.ran_in()}")


app.command(epilog=EVALUATE_EXAMPLE)(evaluate)


@app.command(epilog="Example: mmd-export inspect digits --timesteps 999,749,499,249 --plot plan.png")
def inspect(
    source: Source,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw the plan as a PNG", show_default=False, callback=can_be_written)
    ] = None,
    json: JsonFile = None,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
) -> None:
    """Show the plan as a table, sizes, op counts and provenance."""
    from mmd_export.commands.inspect import inspect as look
    from mmd_export.commands.inspect import plan_rows, plot_plan, require_plan
    from mmd_export.plan import StepPlan

    png("--plot", plot)
    options = PlanOptions(steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps))
    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    facts = look(with_ema(source, ema), options, network)
    if plot:
        require_plan(facts)
    hidden = ("plan", "files", "graph", "parity", "manifest_sha256", "tuned_precision")
    flat = {key: value for key, value in facts.items() if key not in hidden and value not in (None, [], {})}
    flat |= {"tuned_precision": tuned["precision"]} if (tuned := facts.get("tuned_precision")) else {}
    flat |= {f"graph {key}": value for key, value in (facts.get("graph") or {}).items()}
    show_table(str(facts["name"]), ("", ""), [(key, short(value)) for key, value in flat.items()], json)
    if "plan" in facts:
        plan = StepPlan.from_dict(facts["plan"])
        title = f"{plan.solver}, {plan.step_count} steps, {plan.prediction_type}, {plan.noisy_steps} step noises"
        show_table(title, ("step", "timestep", "alpha", "sigma", "clean guess", "next state"), plan_rows(plan), json)
    write_json(json, facts)
    if plot:
        plot_plan(facts, plot)
        say(f"{plot}: the plan as a picture")


@app.command(epilog="Example: mmd-export doctor --imports --json -")
def doctor(
    imports: Annotated[
        bool,
        typer.Option(
            "--imports",
            help="also import each installed package in a process of its own (a minute or so): finds broken ones",
        ),
    ] = False,
    json: JsonFile = None,
) -> None:
    """What can be built and run on this machine, and the pip line for the rest."""
    from mmd_export.commands.doctor import doctor as look
    from mmd_export.commands.doctor import doctor_rows

    facts = look(imports, say)
    title = f"mmd-export {facts['mmd_export']} on {facts['machine']}"
    heads = ("", "name", "builds here", "runs here", "detail", "install")
    show_table(title, heads, doctor_rows(facts), json)
    write_json(json, facts)


def main() -> None:
    """Run the command line; an expected error, or a crash, is one line on stderr and its exit code."""
    if (code := supervise(sys.argv[1:])) is None:
        code = 1
        try:
            code = run(app)
        finally:
            JOURNAL.end(code)
    sys.exit(code)


def run(entry: Callable[..., Any], arguments: list[str] | None = None) -> int:
    """The exit code of one command."""
    import os

    try:
        ended = entry(args=arguments, standalone_mode=False)
        code = ended if isinstance(ended, int) else 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except MmdExportError as error:
        line = " ".join(str(error).split())
        if is_out_of_memory(error) and not isinstance(error, NotAvailableError):
            return _out_of_memory(line.rpartition("; ")[0] or line)  # its next move was for another cause
        say(f"error: {line}")
        return error.exit_code
    except Exception as error:
        if (wrong := usage_line(error, sys.argv[1:] if arguments is None else arguments)) is not None:
            if wrong:
                say(f"error: {wrong}")
            return UsageError.exit_code
        if os.environ.get(TRACEBACK):
            raise
        return _unexpected(error)
    if code == INTERRUPTED:  # typer's answer to KeyboardInterrupt
        say("interrupted; nothing half-written was left, saved states are kept (finetune --resume [--finish])")
    return code


def _unexpected(error: Exception) -> int:
    """What is known of an error that no code of ours raised."""
    if isinstance(error, ModuleNotFoundError) and (lacking := missing_line(error)):
        say(f"error: {lacking}")
        return NotAvailableError.exit_code
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(":")
    if is_out_of_memory(error):
        return _out_of_memory(reason)
    if (broken := broken_line(error)) is not None:
        say(f"error: {broken}")
        return NotAvailableError.exit_code
    say(f"unexpected error: {reason}; set {TRACEBACK}=1 for the traceback")
    return 1


def _out_of_memory(reason: str) -> int:
    say(f"error: out of memory: {reason}; free memory or ask for less at once, and run again")
    return NotAvailableError.exit_code


if __name__ == "__main__":
    main()
