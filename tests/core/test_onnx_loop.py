"""The sampler as one ONNX Loop: the same numbers as the unrolled graph, and a size that does not know K."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.onnx_lint import require_clean
from mmd_export.onnx_loop import loop_tables
from mmd_export.onnx_nodes import constant
from mmd_export.parity import artefact_rung
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.runtime import RunOptions
from mmd_export.targets import get_target
from mmd_export.targets.onnx import LARGEST_FILE, LOADS_WITHIN, LOOP_ABOVE, chosen_form
from mmd_runtime.registry import runtime_for

ROOT = Path(__file__).parents[2]

# One each: deterministic, a clamped guess and noise, multistep with outputs and states behind, two noises a step.
SAMPLERS = ("ddim", "ddpm", "unipc", "pndm", "dpmsolver-sde")
OPTIONS = RunOptions(threads=1)


def build_form(model: Path, out: Path, form: str, steps: int, sampler: str = "ddim", batch: str = "2") -> Bundle:
    return build(
        BuildOptions(str(model), "onnx", out, steps=steps, sampler=sampler, form=form, batch=batch, verify=False)
    )


@pytest.fixture(scope="module")
def two_steps(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_form(tiny, tmp_path_factory.mktemp("loops") / "two", "loop", 2)


@pytest.fixture(scope="module")
def four_steps(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_form(tiny, tmp_path_factory.mktemp("loops") / "four", "loop", 4)


@pytest.fixture(scope="module")
def multistep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_form(tiny, tmp_path_factory.mktemp("loops") / "pndm", "loop", 4, "pndm")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_both_forms_are_the_same_sampler(tiny: Path, tmp_path: Path, sampler: str) -> None:
    runtime, samples = runtime_for("onnx"), []
    for form in ("unrolled", "loop"):
        bundle = build_form(tiny, tmp_path / form, form, 6, sampler)
        assert bundle.manifest.graph.form == form
        session, chain = runtime.open(bundle, OPTIONS), runtime.open_chain(bundle, OPTIONS)
        rung = artefact_rung(bundle, session, chain)
        assert rung.passed, list(rung.failures)
        calls = len(bundle.manifest.plan["steps"])
        assert len(rung.comparisons) == 1 + 2 * calls  # every state, free-running and teacher-forced
        samples.append(session.run(inputs_of(bundle))["sample"])
    np.testing.assert_allclose(samples[0], samples[1], rtol=0, atol=2e-5)


def inputs_of(bundle: Bundle) -> dict[str, np.ndarray]:
    golden = bundle.golden().inputs
    return {name: array[:, :2] if name == "step_noise" else array[:2] for name, array in golden.items()}


def test_a_loop_takes_any_batch_and_class_labels(tiny_labels: Path, tmp_path: Path) -> None:
    bundle = build_form(tiny_labels, tmp_path / "b", "loop", 3, "ddpm", "1..3")
    session = runtime_for("onnx").open(bundle, OPTIONS)
    inputs = inputs_of(bundle)
    both = session.run(inputs)["sample"]
    np.testing.assert_allclose(both, bundle.golden().sample[:2], rtol=0, atol=1e-5)
    other = session.run(inputs | {"class_labels": (inputs["class_labels"] + 1) % 5})["sample"]
    assert np.abs(other - both).max() > 1e-3


@pytest.mark.parametrize(("precision", "largest_file"), [("w8", LARGEST_FILE), ("w4", LARGEST_FILE), ("w8", 2**10)])
def test_quantised_products_find_their_weights(
    precision: str, largest_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime looks for those of query, key and value in the body alone."""
    monkeypatch.setattr(get_target("onnx"), "largest_file", largest_file)
    options = BuildOptions("digits", "onnx", tmp_path / "digits", precision, steps=2, form="loop")
    bundle = build(options)
    assert bundle.manifest.parity is not None
    graph = onnx.load(bundle.artefact_path).graph
    (body,) = (attribute.g for node in graph.node for attribute in node.attribute if attribute.name == "body")
    inside, outside = ({tensor.name for tensor in each.initializer} for each in (body, graph))
    products = {node.input[1] for node in body.node if node.op_type in ("MatMul", "Gemm")}
    read = {name for node in body.node if node.op_type == "DequantizeLinear" and node.output[0] in products
            for name in node.input}  # fmt: skip
    assert len(read) >= 4
    assert read <= inside
    assert not read & outside
    weights = sum(len(tensor.raw_data) for each in (body, graph) for tensor in each.initializer)
    assert bundle.manifest.graph.unique_weight_bytes == weights


def test_its_size_does_not_grow_with_the_steps(two_steps: Bundle, tiny: Path, tmp_path: Path) -> None:
    few, many = two_steps, build_form(tiny, tmp_path / "many", "loop", 30)
    assert many.manifest.graph.nodes == few.manifest.graph.nodes
    tables = many.artefact_path.stat().st_size - few.artefact_path.stat().st_size
    assert 0 < tables < 28 * 2048  # a row of the folded time path, and the plan's numbers
    unrolled = build_form(tiny, tmp_path / "unrolled", "unrolled", 15)
    assert unrolled.manifest.graph.nodes > 10 * many.manifest.graph.nodes


def test_two_builds_are_the_same_bytes(multistep: Bundle, tiny: Path, tmp_path: Path) -> None:
    again = build_form(tiny, tmp_path / "again", "loop", 4, "pndm")
    assert multistep.artefact_path.read_bytes() == again.artefact_path.read_bytes()


@pytest.mark.parametrize("table", ["plan/state.weight0", "plan/output.weight0"])
def test_a_wrong_number_in_a_table_fails_at_its_step(four_steps: Bundle, tmp_path: Path, table: str) -> None:
    bundle = Bundle(shutil.copytree(four_steps.folder, tmp_path / "b"), four_steps.manifest)
    model = onnx.load(bundle.artefact_path)
    tensor = next(each for each in model.graph.initializer if each.name == table)
    numbers = numpy_helper.to_array(tensor).copy()
    numbers[2] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(numbers, table))
    onnx.save(model, bundle.artefact_path)
    chain = runtime_for("onnx").open_chain(bundle, OPTIONS)
    golden = bundle.golden()
    known = inputs_of(bundle) | {f"state.{k}": state[:2] for k, state in enumerate(golden.states, start=1)}
    errors = [np.abs(chain.run_step(k, known) - golden.states[k - 1][:2]).max() for k in range(1, 5)]
    assert [error > 1e-3 for error in errors] == [False, False, True, False]


def test_a_step_without_its_states_is_refused(multistep: Bundle) -> None:
    chain, inputs = runtime_for("onnx").open_chain(multistep, OPTIONS), inputs_of(multistep)
    with pytest.raises(UsageError, match=r"step 3 reads 'state\.1', given: .*; add it"):
        chain.run_step(3, inputs | {"state.2": inputs["noise"]})


def test_the_tables_hold_every_term() -> None:
    first = Step(9.0, 0.6, 0.8, (Term("state", 0, 2.0), Term("noise", 0, 0.5)), scale=0.5)
    second = Step(3.0, 0.9, 0.4, (Term("state", 0, 3.0), Term("output", 1, 4.0), Term("clean", 1, 5.0)), (0.1, 0.2))
    tables = loop_tables(StepPlan("mine", "epsilon", (first, second), clip=1.0))
    assert {key: column.tolist() for key, column in tables.weights.items()} == {
        ("state", 0): [2.0, 0.0], ("output", 0): [0.0, 4.0], ("clean", 0): [0.0, 5.0], ("state", 1): [0.0, 3.0],
    }  # fmt: skip
    assert tables.noise_weight.tolist() == [[0.5], [0.0]]
    assert tables.scale.tolist() == [0.5, 1.0]
    np.testing.assert_array_equal(tables.clean_output, np.array([0.0, 0.2], np.float32))
    assert (tables.depth("state"), tables.depth("output")) == (1, 0)


def test_auto_unrolls_what_was_measured_to_load_quickly() -> None:
    rows = [
        row
        for name in ("forms.json", "forms_large.json")
        for row in json.loads((ROOT / "benchmarks/results" / name).read_text())["rows"]
    ]
    slow = min(row["steps"] for row in rows if row["unrolled"]["load_cpu_seconds"] > LOADS_WITHIN)
    assert max(row["steps"] for row in rows if row["steps"] < slow) == LOOP_ABOVE
    assert chosen_form("auto", LOOP_ABOVE) == "unrolled"
    assert chosen_form("auto", LOOP_ABOVE + 1) == "loop"
    assert chosen_form("loop", 1) == "loop"


@pytest.mark.parametrize("place", [0, 1])
def test_the_lint_refuses_a_loop_that_data_can_stop(two_steps: Bundle, place: int) -> None:
    model = ir.load(two_steps.artefact_path)
    require_clean(model)
    loop = next(node for node in model.graph if node.op_type == "Loop")
    loop.replace_input_with(place, model.graph.inputs[0])
    with pytest.raises(NotAvailableError, match=r"node 'loop' \(Loop\)"):
        require_clean(model)


def test_the_lint_looks_at_the_weights_of_the_body(two_steps: Bundle) -> None:
    model = ir.load(two_steps.artefact_path)
    loop = next(node for node in model.graph if node.op_type == "Loop")
    constant(loop.attributes["body"].as_graph(), "double", np.zeros(3))
    with pytest.raises(NotAvailableError, match="float64 weight 'double'"):
        require_clean(model)


def test_a_form_that_is_none(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target onnx has no --form spiral; it has auto, unrolled, loop"):
        build_form(tiny, tmp_path / "b", "spiral", 2)
    assert not list(tmp_path.iterdir())
