"""``verify --bisect`` names the operator that was spoilt, in the graph's arithmetic and in the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.bisect import KINDS, planted, search, spoilt
from benchmarks.faults import Lab
from mmd_export.bisect import call_value
from mmd_export.blame import checkpoint_graph
from mmd_export.commands.verify import verify
from mmd_export.errors import NotAvailableError, ParityError, UsageError
from mmd_export.graph_parts import GraphParts


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("bisect"))


@pytest.fixture(scope="module")
def reference(lab: Lab) -> ir.Model:
    return checkpoint_graph(lab.honest("onnx"), lab.checkpoint, lab.plan)


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
    clip = next(node for node in model.graph if node.outputs[0].name == "sample")
    clip.replace_input_with(2, _number(model, 0.5))
    found = search(planted(lab, good, model), reference)
    assert (found.step, found.value, found.operator) == (lab.plan.step_count + 1, "sample", "Clip")


def _number(model: ir.Model, number: float) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.float32), name="half")
    value = ir.Value(name="half", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()), const_value=tensor)
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
