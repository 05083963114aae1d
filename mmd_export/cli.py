"""The command line: options in, one function of ``mmd_export.commands`` or ``build`` called, its value printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmd_export.cli_build import BUILD_EXAMPLES, FINALIZE_EXAMPLES, build, finalize
from mmd_export.cli_embed import EMBED_EXAMPLES, embed
from mmd_export.cli_network import Conditions, GuidanceForm, GuidanceScale, NullLabel, TextLength
from mmd_export.cli_options import (
    BundleFolder,
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
    TunedModel,
    listed,
    positive,
    with_ema,
    with_ema_if_given,
)  # fmt: skip
from mmd_export.cli_output import say, short, show, show_table, write_json
from mmd_export.errors import MmdExportError
from mmd_export.network_options import NetworkOptions
from mmd_export.plan_options import PlanOptions

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


@app.command(epilog="Example: mmd-export finetune digits --steps 5 --out runs/digits-5")
def finetune(
    model: TunedModel = None,
    steps: Steps = None,
    out: Annotated[Path | None, typer.Option(help="run folder to make", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings; options win", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, a .npz or .npy file, or a folder of images", show_default=False)
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="encoders of the loss, comma-separated", show_default=False)
    ] = None,
    holdout: Annotated[str | None, typer.Option(help="encoder that only scores", show_default=False)] = None,
    kernel: Annotated[str | None, typer.Option(help="gaussian, cubic or linear", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="images of one MMD estimate", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of Adam", show_default=False)] = None,
    iterations: Annotated[int | None, typer.Option(help="optimiser steps", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="of the noise", show_default=False)] = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
) -> None:
    """Tune a model with the MMD through the whole sampling chain, for one step budget. Writes a run folder."""
    from mmd_finetune.loop import tune
    from mmd_finetune.progress import ProgressBar
    from mmd_finetune.settings import make_settings

    given = {
        "model": with_ema_if_given(model, ema), "steps": steps, "out": out, "data": data, "features": features,
        "holdout": holdout, "kernel": kernel, "batch_size": batch_size, "learning_rate": lr, "iterations": iterations,
        "seed": seed, "sampler": sampler, "eta": eta, "spacing": spacing, "timesteps": listed(timesteps),
    }  # fmt: skip
    settings = make_settings(given, config)
    with ProgressBar() as observer:
        result = tune(settings, resume=resume, observer=observer)
    show(
        f"{result.folder}: held-out Frechet distance {result.held_out_before:.2f} -> {result.held_out_after:.2f} "
        f"(best at iteration {result.best_iteration} of {result.iterations}, {result.seconds:.0f} s)\n"
        f"next: mmd-export build {result.folder} --target onnx --out bundle"
    )


app.command(epilog=BUILD_EXAMPLES)(build)
app.command(epilog=FINALIZE_EXAMPLES)(finalize)
app.command(epilog=EMBED_EXAMPLES)(embed)


@app.command(epilog="Example: mmd-export verify digits-5.bundle --json parity.json")
def verify(
    bundle: BundleFolder, runtime: RuntimeName = None, checkpoint: CheckpointOption = None, json: JsonFile = None
) -> None:
    """Check the artefact against the float64 reference, after every step. Exit 4 when it fails."""
    from mmd_export.bundle import Bundle
    from mmd_export.commands.verify import verify as check

    report = check(Bundle.open(bundle), runtime, checkpoint, say)
    rows = [
        (str(rung.number), rung.title, "-" if rung.skipped else f"{rung.worst:.1e}", f"{rung.atol:g}", rung.verdict)
        for rung in report.rungs
    ]
    heads = ("rung", "checks", "worst", "tolerance", "verdict")
    show_table(f"Parity of {report.bundle} in {report.runtime}", heads, rows, json)
    say(f"{report.runtime}: {report.detail}")
    for reason in sorted({rung.skipped for rung in report.rungs if rung.skipped}):
        say(f"not checked: {reason}")
    for reason in (rung.unseen for rung in report.rungs if rung.unseen):
        say(f"the sample alone was compared, not the states before it: {reason}")
    for placement in (rung.placement for rung in report.rungs if rung.placement):
        say(placement.summary)
    write_json(json, report.to_dict())
    report.require()


@app.command(epilog="Example: mmd-export bench digits-5.bundle --against torch --against per-step")
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="bundle folders", show_default=False)],
    against: Annotated[
        list[str] | None, typer.Option(help="torch, per-step, a runtime or a bundle; repeatable", show_default=False)
    ] = None,
    runtime: RuntimeName = None,
    checkpoint: CheckpointOption = None,
    rounds: Annotated[
        int | None, typer.Option(help="interleaved rounds; default: as many as fit", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="time to spend when --rounds is not given")] = 30.0,
    threads: Annotated[int, typer.Option(help="CPU threads a run; 0: each library's choice")] = 0,
    bound: Annotated[
        bool, typer.Option("--bound", help="keep inputs and outputs on the device, where the runtime can")
    ] = False,
    gate: Annotated[
        Path | None, typer.Option(help="JSON file with limits; exit 6 when one is broken", show_default=False)
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="write the result into the bundle's model card")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Measure latency, interleaved with torch eager and with the usual one-step session called K times."""
    from mmd_export.commands import bench as command

    positive("--rounds", rounds)
    options = command.BenchOptions(
        tuple(bundles), tuple(against or ()), runtime, checkpoint, rounds, seconds, threads, bound
    )
    report = command.bench(options, say)
    heads = ("", "median ms", "p90", "p99", f"times {report.candidates[0]} [95 %]")
    show_table(
        f"Latency, batch {report.batch}, {report.latency.rounds} rounds", heads, command.summary_rows(report), json
    )
    for name, placement in report.placements.items():
        say(f"{name}: {placement.summary}")
    for note in report.latency.notes:
        say(note)
    write_json(json, report.to_dict())
    if update_card:
        command.write_card(bundles[0], report)
    for verdict in command.check_gates(report, gate) if gate else ():
        show(f"gate {verdict.verdict}: {verdict.message}")


@app.command(epilog="Example: mmd-export sample digits-5.bundle --seed 7 --count 64 --out grid.png")
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="PNG file to write")] = Path("grid.png"),
    seed: Annotated[int, typer.Option(help="image i of a seed is the same everywhere")] = 0,
    count: Annotated[int, typer.Option(help="how many images")] = 16,
    runtime: RuntimeName = None,
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
    from mmd_export.commands.sample import SampleOptions
    from mmd_export.commands.sample import sample as draw
    from mmd_export.pictures import save_grid

    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    options = SampleOptions(
        with_ema(source, ema), seed, count, runtime, checkpoint, class_label, network, tuple(condition or ()),
        steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps),
    )  # fmt: skip
    save_grid(draw(options), out)
    show(f"{out}: {count} images of seed {seed}")


@app.command(epilog="Example: mmd-export evaluate runs/digits-5 --data digits")
def evaluate(
    source: Source,
    data: Annotated[str, typer.Option(help="digits, a .npz or .npy file, or a folder of images")] = "digits",
    features: Annotated[str, typer.Option(help="encoders, comma-separated")] = "digits-conv,digits-mlp",
    count: Annotated[int, typer.Option(help="samples to draw")] = 1797,
    seed: Annotated[int, typer.Option(help="of the noise")] = 1,
    runtime: RuntimeName = None,
    checkpoint: CheckpointOption = None,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    json: JsonFile = None,
    condition: Conditions = None,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
) -> None:
    """Score samples against real images: Frechet distance on each encoder, and the share of each class."""
    from mmd_export.commands.evaluate import evaluate as score
    from mmd_export.commands.sample import SampleOptions

    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    options = SampleOptions(
        with_ema(source, ema), seed, count, runtime, checkpoint, None, network, tuple(condition or ()),
        steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps),
    )  # fmt: skip
    result = score(options, data, tuple(name.strip() for name in features.split(",")), say)
    rows = [(name, f"{value:.3f}") for name, value in result["frechet_distance"].items()]
    show_table(
        f"Frechet distance of {count} samples to {result['real_images']} real images",
        ("encoder", "distance"),
        rows,
        json,
    )
    write_json(json, result)


@app.command(epilog="Example: mmd-export inspect digits --timesteps 999,749,499,249 --plot plan.png")
def inspect(
    source: Source,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    plot: Annotated[Path | None, typer.Option(help="draw the plan as a PNG", show_default=False)] = None,
    json: JsonFile = None,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
) -> None:
    """Show the plan as a table, sizes, op counts and provenance."""
    from mmd_export.commands.inspect import inspect as look
    from mmd_export.commands.inspect import plan_rows, plot_plan
    from mmd_export.plan import StepPlan

    options = PlanOptions(steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps))
    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    facts = look(with_ema(source, ema), options, network)
    hidden = ("plan", "files", "graph", "parity", "manifest_sha256")
    flat = {key: value for key, value in facts.items() if key not in hidden and value not in (None, [], {})}
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


@app.command(epilog="Example: mmd-export doctor --json -")
def doctor(json: JsonFile = None) -> None:
    """What can be built and run on this machine, and the pip line for the rest."""
    from mmd_export.commands.inspect import doctor as look
    from mmd_export.commands.inspect import doctor_rows

    facts = look()
    title = f"mmd-export {facts['mmd_export']} on {facts['machine']}"
    heads = ("", "name", "builds here", "runs here", "detail", "install")
    show_table(title, heads, doctor_rows(facts), json)
    write_json(json, facts)


def main() -> None:
    """Run the command line; an expected error is one line on stderr and its exit code."""
    sys.exit(run(app))


def run(entry: Callable[..., Any], arguments: list[str] | None = None) -> int:
    """The exit code of one command."""
    import os

    try:
        entry(args=arguments, standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code == INTERRUPTED:  # typer's answer to KeyboardInterrupt
            say("interrupted; nothing half-written was left, saved states are kept (finetune --resume)")
        return code
    except MmdExportError as error:
        say(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except Exception as error:
        if os.environ.get("MMD_EXPORT_TRACEBACK"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        say(f"unexpected error: {reason}; set MMD_EXPORT_TRACEBACK=1 for the traceback")
        return 1
    return 0


if __name__ == "__main__":
    main()
