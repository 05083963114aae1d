"""What breaks the budget of a bundle's rung 6: its graph and that of its checkpoint, searched from step to operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from mmd_export.bisect import asked_step, find, question_of
from mmd_export.bundle import Bundle, Golden, take
from mmd_export.comparison import FRESH, Comparison
from mmd_export.onnx_calls import exact_calls, graph_spec, unrolled
from mmd_export.onnx_forms import make_lean, suit_processors
from mmd_export.parity import Culprit, Rung, chunks

if TYPE_CHECKING:
    from mmd_export.checkpoint import Checkpoint
    from mmd_export.plan import StepPlan


def find_culprit(
    bundle: Bundle,
    rung: Rung,
    checkpoint: Checkpoint,
    plan: StepPlan,
    fresh: Golden | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Culprit:
    """Of an unrolled ONNX graph step, block and operator; of another artefact the step alone."""
    manifest = bundle.manifest
    if manifest.format != "onnx" or manifest.graph.form != "unrolled":
        what = "a loop" if manifest.format == "onnx" else manifest.format
        return step_alone(bundle, rung, f"blocks and operators are told apart in unrolled ONNX graphs, this is {what}")
    notify("bisect: a fresh float32 graph of the checkpoint")
    reference = checkpoint_graph(bundle, checkpoint, plan)
    notify("bisect: searching blocks, then operators")
    return blame(bundle, rung, ir.load(bundle.artefact_path), reference, fresh)


def step_alone(bundle: Bundle, rung: Rung, note: str) -> Culprit:
    """The first step that breaks the budget, and why it was not looked further."""
    first = None if rung.budget is None else rung.budget.first_step
    return Culprit(first or bundle.golden().steps + 1, note=note)


def blame(bundle: Bundle, rung: Rung, artefact: ir.Model, reference: ir.Model, fresh: Golden | None = None) -> Culprit:
    """The same with both graphs at hand, on the noises and the batch in which the step is worst."""
    noises, image = worst_place(rung)
    golden = fresh if noises == "fresh" and fresh is not None else bundle.golden()
    inputs, rows = next(part for part in chunks(bundle, golden) if part[1].start <= image < part[1].stop)
    states = [take("state", state, rows) for state in golden.states]
    return find(artefact, reference, question_of(rung, inputs, states, golden.sample[rows]))


def worst_place(rung: Rung) -> tuple[str, int]:
    """Whether golden or fresh noises show what breaks the budget, and the image of them that shows it most.

    A step that is wrong by itself is worst where its teacher-forced state is; one that only adds most, where it adds
    most; what follows the last state, where the sample is.
    """
    step, by_itself = asked_step(rung)
    budget = rung.budget
    assert budget is not None  # asked_step has seen it
    if step > len(budget.steps):
        samples = sorted((each for each in rung.failures if each.output == "sample"), key=_is_fresh)
        image = samples[0].worst_index[0] if samples and samples[0].worst_index else 0
        return ("fresh" if samples and _is_fresh(samples[0]) else "golden"), image
    error = budget.steps[step - 1]
    return budget.noises, error.required_image if by_itself else error.local_image


def _is_fresh(comparison: Comparison) -> bool:
    return comparison.name.startswith(FRESH)


def checkpoint_graph(bundle: Bundle, checkpoint: Checkpoint, plan: StepPlan) -> ir.Model:
    """The float32 graph that the checkpoint gives now, unrolled: the bundle's batches, output and form."""
    from mmd_export.program import export_program

    batch = bundle.manifest.batch
    size = batch.smallest if batch.is_static else None
    program = export_program(
        checkpoint.denoiser, plan, checkpoint.shape, size, checkpoint.conditions, checkpoint.decoder
    )
    calls, spec = exact_calls(program), graph_spec(program, bundle.manifest.spec("sample").dtype)
    if bundle.manifest.precision == "fp32":
        make_lean(calls.model, spec)
    graph = unrolled(calls, spec)
    if bundle.manifest.graph.device == "cpu":
        suit_processors(graph)
    return graph
