"""``verify --bisect`` names the operator that was spoilt, in the graph's arithmetic and in the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.bisection import KINDS, planted, scale_weight, spoilt
from benchmarks.faults import Lab
from mmd_export.bisect import call_value
from mmd_export.blame import blame, checkpoint_graph, worst_place
from mmd_export.bundle import Bundle, Golden, take
from mmd_export.commands.verify import verify
from mmd_export.comparison import NO_LIMITS, Limits
from mmd_export.errors import NotAvailableError, ParityError, UsageError
from mmd_export.graph_parts import GraphParts
from mmd_export.ladder import fresh_golden
from mmd_export.parity import Culprit, Rung, check_artefact
from mmd_export.runtime import RunOptions
from mmd_runtime.registry import runtime_for


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("bisect"))


@pytest.fixture(scope="module")
def reference(lab: Lab) -> ir.Model:
    return checkpoint_graph(lab.honest("onnx"), lab.checkpoint, lab.plan)


def search(bundle: Bundle, reference: ir.Model) -> Culprit:
    """Rung 6, and what breaks it."""
    rung = check_artefact(bundle, runtime_for("onnx"), RunOptions(1))
    return blame(bundle, rung, ir.load(bundle.artefact_path), reference)


def test_nothing_is_to_blame_where_rung_6_passes(lab: Lab, reference: ir.Model) -> None:
    with pytest.raises(ValueError, match="rung 6 passes"):
        search(lab.honest("onnx"), reference)


@pytest.mark.parametrize("seed", range(3))
def test_the_spoilt_operator_is_named(lab: Lab, reference: ir.Model, seed: int) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    step, value = spoilt(model, KINDS[seed % len(KINDS)], np.random.default_rng(seed))
    found = search(planted(lab, good, model), reference)
    assert (found.step, found.value) == (step, value), found.message
    assert found.block == GraphParts(reference).labels[value]
    assert found.before <= found.budget < found.error
    assert found.evaluations < 40
    assert call_value(found) == value.split("/", 1)[1]


def clipped(model: ir.Model, value: str, above: float) -> None:
    """What ``value`` is above a number is lost."""
    node = next(node for node in model.graph if node.outputs[0].name == value)
    inner = node.outputs[0]
    outer = ir.Node("", "Min", [inner, _number(model, above, "above")], num_outputs=1)
    model.graph.insert_after(node, outer)
    ir.convenience.replace_all_uses_with(inner, outer.outputs[0])
    outer.replace_input_with(0, inner)
    outer.outputs[0].name, inner.name = value, f"{value}.before"


def ends_wrong(model: ir.Model) -> None:
    """The sample is cut at 0.5, so that every image fails at its end."""
    clip = next(node for node in model.graph if node.outputs[0].name == "sample")
    clip.replace_input_with(2, _number(model, 0.5, "half"))


def largest(parts: GraphParts, golden: Golden) -> dict[str, list[float]]:
    """What the convolutions of step 2 give at most, by image."""
    values = [name for name, node in parts.producer.items() if node.op_type == "Conv" and name.startswith("step.1/")]
    runs = []
    for image in range(golden.count):
        rows = slice(image, image + 1)
        known = {name: take(name, array, rows) for name, array in golden.inputs.items()}
        runs.append(parts.run({**known, "state.1": golden.states[0][rows]}, values))
    return {name: [float(run[name].max()) for run in runs] for name in values}


def test_the_image_is_that_of_the_step_not_of_the_first_failure(lab: Lab, reference: ir.Model) -> None:
    """The samples fail everywhere, first in image 0; step 2 is wrong for another image alone."""
    good = lab.honest("onnx")
    model, parts = ir.load(good.artefact_path), GraphParts(reference)
    seen = largest(parts, good.golden())
    value = max(seen, key=lambda name: (np.argmax(seen[name]) != 0) * np.ptp(sorted(seen[name])[-2:]))
    assert np.argmax(seen[value]) != 0
    clipped(model, value, sorted(seen[value])[-2])
    ends_wrong(model)
    bad = planted(lab, good, model)
    rung = check_artefact(bad, runtime_for("onnx"), RunOptions(1))
    assert rung.failures[0].name == "sample"
    assert worst_place(rung) == ("golden", int(np.argmax(seen[value])))
    assert worst_place(rung)[1] != (rung.failures[0].worst_index or (-1,))[0]
    found = blame(bad, rung, ir.load(bad.artefact_path), reference)
    assert (found.step, found.value) == (2, value), found.message


def test_the_noises_are_those_of_the_budget(lab: Lab, reference: ir.Model) -> None:
    """The golden samples fail at their end; step 2 is wrong on fresh noises alone."""
    good = lab.honest("onnx")
    model, parts = ir.load(good.artefact_path), GraphParts(reference)
    fresh = fresh_golden(good, lab.checkpoint, lab.plan, seed=1)
    golden, drawn = ({name: max(by_image) for name, by_image in largest(parts, each).items()}
                     for each in (good.golden(), fresh))  # fmt: skip
    value = max(golden, key=lambda name: drawn[name] - golden[name])
    assert golden[value] < drawn[value]
    clipped(model, value, golden[value])
    ends_wrong(model)
    bad = planted(lab, good, model)
    rung = check_artefact(bad, runtime_for("onnx"), RunOptions(1), fresh=fresh)
    assert rung.failures[0].name == "sample"
    assert worst_place(rung)[0] == "fresh"
    found = blame(bad, rung, ir.load(bad.artefact_path), reference, fresh)
    assert (found.step, found.value) == (2, value), found.message


def test_the_tolerances_of_the_steps_choose_the_step(lab: Lab, reference: ir.Model) -> None:
    """Two steps are spoilt; the first may be, so the second is named; relative to its size that may be too."""
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    for k, place in enumerate((0, 1)):
        _halve(model, k, place)
    bad = planted(lab, good, model)
    allowed = Limits({"state.1": 1e3})
    rung = check_artefact(bad, runtime_for("onnx"), RunOptions(1), allowed)
    found = blame(bad, rung, ir.load(bad.artefact_path), reference)
    assert (found.step, found.operator) == (2, "Conv"), found.message
    relative = Limits({"state.1": 1e3, "state.2": 1e-3}, {"state.2": 1e-3})
    rung = check_artefact(bad, runtime_for("onnx"), RunOptions(1), relative)
    again = blame(bad, rung, ir.load(bad.artefact_path), reference)
    assert (again.step, again.value, again.budget) == (2, found.value, 1e-3)
    assert again.error < found.error  # by what is relative
    assert rung.budget is not None
    assert again.error == pytest.approx(rung.budget.steps[1].local_required, rel=1e-3)


def _halve(model: ir.Model, k: int, place: int) -> None:
    """One filter of a convolution of call k."""
    nodes = [n for n in model.graph if n.op_type == "Conv" and f"step.{k}/" in str(n.outputs[0].name)]
    scale_weight(model.graph, nodes[place], np.random.default_rng(k))


def test_a_wrong_coefficient_is_blamed_on_the_plan(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    node = next(node for node in model.graph if node.outputs[0].name == "state.2")
    node.replace_input_with(0, node.inputs[1])
    found = search(planted(lab, good, model), reference)
    assert (found.step, found.block, found.value) == (2, "plan", "state.2")
    assert call_value(found) == ""


def test_a_wrong_end_comes_after_the_last_step(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    ends_wrong(model)
    found = search(planted(lab, good, model), reference)
    assert (found.step, found.value, found.operator) == (lab.plan.step_count + 1, "sample", "Clip")


def _number(model: ir.Model, number: float, name: str) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def test_the_command_prints_the_culprit(lab: Lab) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    step, value = spoilt(model, "weight", np.random.default_rng(1))
    bad = planted(lab, good, model)
    report = verify(bad, checkpoint=str(lab.model), bisect=True)
    assert report.culprit is not None
    assert report.to_dict()["bisect"]["value"] == value
    with pytest.raises(ParityError, match=rf"step {step}: block .*: operator Conv, value {value}") as error:
        report.require()
    assert "\n" not in str(error.value)


def test_bisect_needs_the_checkpoint_and_a_failure(lab: Lab) -> None:
    good = lab.honest("onnx")
    assert verify(good, checkpoint=str(lab.model), bisect=True).culprit is None
    model = ir.load(good.artefact_path)
    spoilt(model, "weight", np.random.default_rng(1))
    with pytest.raises(UsageError, match="the checkpoint 'network' was not given; pass --checkpoint MODEL"):
        verify(planted(lab, good, model), bisect=True)


def test_an_artefact_of_another_toolchain_is_refused(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    step, _ = spoilt(model, "weight", np.random.default_rng(1))
    for node in model.graph:
        for value in node.outputs:
            if str(value.name).startswith("step."):
                value.name = f"{value.name}.renamed"
    bad = planted(lab, good, model)
    with pytest.raises(NotAvailableError, match=rf"the graphs share \d+ of \d+ values of step {step}"):
        search(bad, reference)


def test_a_reference_that_is_off_itself_is_not_the_artefacts_fault(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    golden = dict(good.golden().inputs) | {"sample": good.golden().sample}
    golden |= {f"state.{k}": state + np.float32(0.1) for k, state in enumerate(good.golden().states, start=1)}
    from benchmarks.faults import copy_artefact

    bad = lab.sealed(good, lambda folder: copy_artefact(good, folder), golden=golden)
    found = search(bad, reference)
    assert found.operator == ""
    assert "a fresh float32 graph of the checkpoint breaks the budget too" in found.message


def mean_alone(bad: Bundle) -> Rung:
    """Rung 6 where every value is within a wide tolerance, and no mean is within a narrow one."""
    rung = check_artefact(bad, runtime_for("onnx"), RunOptions(1), limits=Limits({"": 10.0}))
    return replace(rung, limits=NO_LIMITS, atol=10.0, mean=1e-4)


def test_where_the_mean_of_a_state_fails_the_step_that_adds_most_is_searched(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    step, value = spoilt(model, "weight", np.random.default_rng(1))
    rung = mean_alone(planted(lab, good, model))
    assert rung.budget is not None
    assert (rung.passed, rung.budget.first_step) == (False, None)
    found = blame(good, rung, model, reference)
    assert (found.step, found.value) == (step, value), found.message
    assert f"every value holds, their mean does not; step {step} adds most" in found.message


def test_where_the_mean_of_the_sample_fails_what_follows_the_states_is_searched(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    model = ir.load(good.artefact_path)
    ends_wrong(model)
    rung = mean_alone(planted(lab, good, model))
    assert {each.output for each in rung.failures} == {"sample"}
    found = blame(good, rung, model, reference)
    assert (found.step, found.value, found.operator) == (lab.plan.step_count + 1, "sample", "Clip"), found.message


def test_where_the_mean_of_an_honest_artefact_fails_no_operator_is_to_blame(lab: Lab, reference: ir.Model) -> None:
    good = lab.honest("onnx")
    rung = check_artefact(good, runtime_for("onnx"), RunOptions(1))
    off = replace(rung, mean=0.0)
    assert not off.passed
    found = blame(good, off, ir.load(good.artefact_path), reference)
    assert found.operator == ""
    assert "a fresh float32 graph of the checkpoint breaks the budget too" in found.message


def test_of_another_format_the_step_alone_is_named(lab: Lab, tmp_path: Path) -> None:
    from benchmarks import faults

    good = lab.honest("openvino")
    wrong = faults.changed_step(lab.plan, 1, timestep=lab.plan.steps[1].timestep - 40)
    bad = lab.sealed(good, lab.compiled("openvino", plan=wrong))
    report = verify(bad, checkpoint=str(lab.model), bisect=True)
    assert report.culprit is not None
    assert (report.culprit.step, report.culprit.operator) == (2, "")
    assert "this is openvino" in report.culprit.message


def test_one_operator_of_a_step_can_be_run_alone(lab: Lab, reference: ir.Model) -> None:
    parts = GraphParts(reference)
    inputs = dict(lab.honest("onnx").golden().inputs)
    known = {name: array[:, :1] if name == "step_noise" else array[:1] for name, array in inputs.items()}
    state = parts.run(known, ["state.1"])["state.1"]
    assert np.allclose(state, lab.honest("onnx").golden().states[0][:1], atol=1e-4)
    again = parts.run({**known, "output.0": parts.run(known, ["output.0"])["output.0"]}, ["state.1", "noise"])
    assert np.allclose(again["state.1"], state, atol=1e-6)
    assert np.array_equal(again["noise"], known["noise"])
