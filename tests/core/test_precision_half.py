"""fp16 and bf16: right, half the size, float32 where it must be; and overflow is found and repaired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.noise import sampler_noise
from mmd_export.onnx_compose import GraphSpec
from mmd_export.onnx_lint import faults, report, require_clean
from mmd_export.onnx_loop import compose_loop
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import BF16, FP16, HALVES, Half
from mmd_export.precision.half import to_half
from mmd_export.precision.islands import fits, islands
from mmd_export.precision.lower import lower, typed
from mmd_export.precision.quantise import Recipe
from mmd_export.precision.scan import scan
from mmd_export.precision.trajectory import SEED, Calls, follow
from mmd_export.reference import golden_inputs, run_chain, sampler_of
from tests.models import ATTENTION, TWO_CHANNELS, save_model, weights_of, write_weights
from tests.precisions import Golden, calls_of, dtypes, hand_made, run, whole

LIMIT = {"fp16": 0.01, "bf16": 0.1}
STATES = ("state.1", "state.2")


@pytest.fixture(scope="module")
def halved(attention_calls: Calls) -> dict[str, ir.Model]:
    return {name: whole(lower(attention_calls, name)) for name in HALVES}


@pytest.mark.parametrize("half", [FP16, BF16], ids=lambda half: half.name)
def test_rounded_after_every_operation_it_is_still_right(
    half: Half, halved: dict[str, ir.Model], attention_golden: Golden
) -> None:
    inputs, expected = attention_golden
    states = run(emulated(halved[half.name], half), inputs, *STATES)
    for name, state in zip(STATES, states, strict=True):
        assert state.dtype == np.float32
        error = np.abs(state - expected[name]).max()
        assert error < LIMIT[half.name], name
        assert error > LIMIT[half.name] / 100, "nothing was rounded"


def test_fp16_runs_in_onnxruntime_with_attention(halved: dict[str, ir.Model], attention_golden: Golden) -> None:
    inputs, expected = attention_golden
    assert "Softmax" in {node.op_type for node in halved["fp16"].graph}
    for name, state in zip(STATES, run(halved["fp16"], inputs, *STATES), strict=True):
        assert np.abs(state - expected[name]).max() < LIMIT["fp16"]


@pytest.mark.parametrize("half", [FP16, BF16], ids=lambda half: half.name)
def test_its_types(half: Half, halved: dict[str, ir.Model], tmp_path: Path) -> None:
    model = halved[half.name]
    assert faults(model, (), half.name) == []
    assert any(half.name in fault or half.dtype.name.lower() in fault for fault in faults(model, ()))
    assert dtypes(model) <= {half.dtype.name, "FLOAT", "INT64", "INT32", "BOOL"}
    assert model.graph.opset_imports[""] == half.opset
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    by_op: dict[str, set[ir.DataType | None]] = {}
    for node in model.graph:
        by_op.setdefault(node.op_type, set()).add(node.outputs[0].dtype)
    assert by_op["Conv"] == {half.dtype, ir.DataType.FLOAT}  # inside, and at the ends
    assert by_op["InstanceNormalization"] == by_op["Softmax"] == {ir.DataType.FLOAT}
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_weights_are_stored_once_in_half(
    halved: dict[str, ir.Model], attention_calls: Calls, tiny_attention: Path
) -> None:
    data = ir.to_proto(halved["fp16"]).SerializeToString()
    large = {name: tensor.numpy() for name, tensor in weights_of(tiny_attention).items() if tensor.dim() == 4}
    assert len(large) > 10
    for name, array in large.items():
        at_an_end = name in ("conv_in.weight", "conv_out.weight")
        assert data.count(array.tobytes()) == at_an_end
        assert data.count(array.astype(np.float16).tobytes()) == (not at_an_end)
    half, full = (report(model).unique_weight_bytes for model in (halved["fp16"], whole(attention_calls)))
    assert half < 0.56 * full


def test_loop_and_free_batch(tiny_labels: Path) -> None:
    """A stochastic, class-conditional model, any batch: the same numbers unrolled and as a loop."""
    exact_calls = calls_of(tiny_labels, 3, None)
    checkpoint = load_checkpoint(str(tiny_labels))
    inputs = golden_inputs(checkpoint, exact_calls.plan, 3)
    expected = run_chain(sampler_of(checkpoint.as_double(), exact_calls.plan), inputs, torch.float64)["sample"]
    for precision, limit in (("fp16", LIMIT["fp16"]), ("int8", 0.2)):
        made = lower(exact_calls, precision, 3, Recipe(per_step=precision == "int8"))
        spec = GraphSpec(made.shape, None, made.conditions)
        loop = compose_loop(made.model.clone(), made.plan, made.constants, spec)
        assert faults(loop, made.conditions, precision) == []
        results = [run(model, inputs, "sample")[0] for model in (whole(made), loop)]
        for found in results:
            assert limit / 100 < np.abs(found - expected).max() < limit
        assert np.abs(results[0] - results[1]).max() < limit


# --- range


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first convolution 3e5 times as large: the GroupNorm behind takes that out, float16 does not hold it."""
    folder = save_model(tmp_path_factory.mktemp("models") / "loud", seed=1, **ATTENTION, **TWO_CHANNELS)
    weights = weights_of(folder)
    for name in ("conv_in.weight", "conv_in.bias"):
        weights[name] = weights[name] * 3e5
    write_weights(folder, weights)
    return folder


def test_an_overflow_is_found_and_repaired(overflowing: Path) -> None:
    checkpoint = load_checkpoint(str(overflowing))
    exact_calls = calls_of(overflowing)
    inputs = golden_inputs(checkpoint, exact_calls.plan, 1)
    expected = run_chain(sampler_of(checkpoint.as_double(), exact_calls.plan), inputs, torch.float64)["sample"]
    said: list[str] = []
    repaired = whole(lower(exact_calls, "fp16", notify=said.append))
    assert "for their range" in said[0]
    found = run(emulated(repaired, FP16), inputs, "sample")[0]
    assert np.abs(found - expected).max() < LIMIT["fp16"]
    assert np.abs(run(repaired, inputs, "sample")[0] - expected).max() < LIMIT["fp16"]

    plain = replace(exact_calls, model=typed(exact_calls.model))
    seen = scan(plain, 1)
    assert set(islands(plain.model, seen, BF16).values()) == {"operation"}  # its range is that of float32
    kept = islands(plain.model, seen, FP16)
    blind = {node: reason for node, reason in kept.items() if reason not in ("range", "sum")}
    assert len(blind) < len(kept)
    wrong = run(emulated(whole(to_half(plain, blind, FP16)), FP16), inputs, "sample")[0]
    assert not np.abs(wrong - expected).max() < 0.1  # NaN, or far off


def plan_of(tiny: Path) -> Any:
    return load_checkpoint(str(tiny)).plan_for(2)


def test_what_a_scan_sees_is_what_there_is(tiny: Path) -> None:
    """y = W x with numbers that can be followed by hand."""
    weight = np.array([[2.0, -3.0], [0.5, 0.0]], np.float32).reshape(2, 2, 1, 1)
    calls = hand_made([("Conv", ["x", "w"], "y", {})], {"w": weight}, plan_of(tiny))
    calls = replace(calls, model=typed(calls.model))
    inputs: list[np.ndarray[Any, Any]] = []
    outputs: list[np.ndarray[Any, Any]] = []
    watched = typed(calls.model)
    identity = ir.Node("", "Identity", [watched.graph.inputs[0]], num_outputs=1)
    identity.outputs[0].name, identity.outputs[0].type = "seen", ir.TensorType(ir.DataType.FLOAT)
    watched.graph.append(identity)
    watched.graph.outputs.append(identity.outputs[0])
    follow(calls, watched, 3, lambda _, seen: inputs.append(seen["seen"]))
    assert len(inputs) == 6  # images times calls
    outputs = [np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) for x in inputs]
    sums = [np.einsum("oi,bihw->bohw", np.abs(weight[:, :, 0, 0]), np.abs(x)) for x in inputs]
    found = scan(calls, 3)
    assert found.largest["x"] == max(np.abs(x).max() for x in inputs)
    assert found.largest["y"] == pytest.approx(max(np.abs(y).max() for y in outputs), rel=1e-6)
    assert found.partial["y"] == pytest.approx(max(s.max() for s in sums), rel=1e-6)
    assert found.largest["w"] == 3.0


def test_the_trajectory_is_the_samplers_own(tiny: Path) -> None:
    """Every call starts where the reference is by then, on the same noise."""
    calls = calls_of(tiny, 3)
    watched = typed(calls.model)
    identity = ir.Node("", "Identity", [watched.graph.inputs[0]], num_outputs=1)
    identity.outputs[0].name, identity.outputs[0].type = "seen", ir.TensorType(ir.DataType.FLOAT)
    watched.graph.append(identity)
    watched.graph.outputs.append(identity.outputs[0])
    seen: dict[int, list[np.ndarray[Any, Any]]] = {}
    follow(calls, watched, 2, lambda k, found: seen.setdefault(k, []).append(found["seen"]))
    checkpoint = load_checkpoint(str(tiny))
    noise = sampler_noise(SEED, 2, calls.shape, 0)
    states = run_chain(sampler_of(checkpoint, calls.plan), noise) | {"state.0": noise["noise"]}
    for k in range(3):
        np.testing.assert_allclose(np.concatenate(seen[k]), states[f"state.{k}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"w": 1.0, "v": 1.0}, None),
        ({"w": 1e4, "v": 1e-4}, "range"),  # the value between the two products
        ({"w": 1e5, "v": 1e-5}, "range"),
        ({"w": 1e-7, "v": 1e7}, "range"),  # too small to keep its digits
    ],
)
def test_the_part_of_the_range_that_is_safe(tiny: Path, weights: dict[str, float], reason: str | None) -> None:
    arrays = {name: np.array(number, np.float32) for name, number in weights.items()}
    nodes: list[Any] = [("Mul", ["x", "w"], "h", {}), ("Mul", ["h", "v"], "y", {})]
    calls = hand_made(nodes, arrays, plan_of(tiny))
    calls = replace(calls, model=typed(calls.model))
    kept = islands(calls.model, scan(calls, 2), FP16)
    assert set(kept.values()) == ({reason} if reason else set())


def test_sums_that_cancel_are_an_island(tiny: Path) -> None:
    """Two equal channels times 8000 and -8000: no value is large, a partial sum is."""
    same = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32).reshape(2, 2, 1, 1)
    apart = np.array([[8e3, -8e3], [1.0, 1.0]], np.float32).reshape(2, 2, 1, 1)
    nodes: list[Any] = [("Conv", ["x", "same"], "h", {}), ("Conv", ["h", "apart"], "y", {})]
    calls = hand_made(nodes, {"same": same, "apart": apart}, plan_of(tiny))
    calls = replace(calls, model=typed(calls.model))
    found = scan(calls, 2)
    assert found.largest["y"] < 20.0
    kept = islands(calls.model, found, FP16)
    assert {node.outputs[0].name: reason for node, reason in kept.items()} == {"y": "sum"}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # that is what it is about
def test_the_squares_inside_a_norm(tiny: Path) -> None:
    """Values near 2000 fit, their squares do not: shown by an evaluator that computes in float16 inside too."""
    weights = {"loud": np.array(500.0), "scale": np.ones(2), "bias": np.zeros(2)}
    nodes: list[Any] = [
        ("Mul", ["x", "loud"], "h", {}),
        ("InstanceNormalization", ["h", "scale", "bias"], "y", {"epsilon": 1e-5}),
    ]
    calls = hand_made(nodes, {name: np.asarray(array, np.float32) for name, array in weights.items()}, plan_of(tiny))
    noise = {"noise": sampler_noise(SEED, 1, (2, 4, 4), 0)["noise"]}
    exact = run(whole(calls), noise, "output.0")[0]
    typed_calls = replace(calls, model=typed(calls.model))
    kept = islands(typed_calls.model, scan(typed_calls, 2), FP16)
    assert set(kept.values()) == {"operation"}
    errors = []
    choices: list[dict[ir.Node, str]] = [kept, {}]
    for chosen in choices:
        made = replace(calls, model=typed(calls.model))
        names = {node.name for node in chosen}
        model = whole(to_half(made, dict.fromkeys((node for node in made.model.graph if node.name in names), ""), FP16))
        proto = ir.to_proto(model)
        proto.graph.output.append(onnx.helper.make_tensor_value_info("output.0", 1, None))
        (found,) = ReferenceEvaluator(proto).run(["output.0"], noise)
        errors.append(float(np.abs(found - exact).max()))
    assert errors[0] < 0.01
    assert not errors[1] < 0.1


def test_a_tiny_number_is_an_island(tiny: Path) -> None:
    """x / (x x + 1e-15): in float16 the number is 0 and 0 / 0 is NaN."""
    nodes: list[Any] = [
        ("Mul", ["x", "x"], "xx", {}),
        ("Add", ["xx", "epsilon"], "h", {}),
        ("Div", ["x", "h"], "z", {}),
        ("Clip", ["z", "low", "high"], "y", {}),
    ]
    weights = {"epsilon": np.float32(1e-15), "low": np.float32(-1), "high": np.float32(1)}
    calls = hand_made(nodes, {name: np.asarray(array) for name, array in weights.items()}, plan_of(tiny))
    calls = replace(calls, model=typed(calls.model))
    kept = islands(calls.model, scan(calls, 1), FP16)
    assert "Add" in {node.op_type for node in kept}
    found = run(emulated(whole(to_half(calls, kept, FP16)), FP16), {"noise": np.zeros((1, 2, 4, 4), np.float32)})[0]
    assert np.isfinite(found).all()


def test_fits() -> None:
    assert fits(0.0, FP16)
    assert fits(8188.0, FP16)
    assert not fits(8189.0, FP16)
    assert fits(6.2e-5, FP16)
    assert not fits(6.0e-5, FP16)
    assert not fits(float("inf"), FP16)
    assert fits(1e30, BF16)


# --- refusals


def test_a_trajectory_that_is_not_finite_has_no_ranges(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "broken", seed=1)
    weights = weights_of(folder)
    weights["conv_in.weight"] = torch.full_like(weights["conv_in.weight"], 3e38)  # finite, as a checkpoint must be
    write_weights(folder, weights)
    calls = calls_of(folder)
    for precision, says in (("fp16", "is NaN in call 0"), ("int8", "is NaN or infinite in call 0")):
        with pytest.raises(UsageError, match=f"value .* {says} of the float32 network; check its weights") as error:
            lower(calls, precision)
        assert error.value.exit_code == 2


def test_the_lint_refuses_halves_where_none_belong(halved: dict[str, ir.Model]) -> None:
    with pytest.raises(NotAvailableError, match="float16 "):
        require_clean(halved["fp16"])
    with pytest.raises(NotAvailableError, match="bfloat16 "):
        require_clean(halved["bf16"], (), "fp16")
    planted = halved["fp16"].clone()
    next(value for node in planted.graph for value in node.outputs if value.name == "state.1").type = ir.TensorType(
        ir.DataType.FLOAT16
    )
    assert "state 'state.1' that is not float32" in faults(planted, (), "fp16")
    planted.graph.opset_imports[""] = 22
    assert "opset 22, fp16 needs 20" in faults(planted, (), "fp16")
