"""int8, fp8 and weight-only: on the grid that was said, in front of the layers that were meant, from the trajectory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.onnx_lint import faults, require_clean
from mmd_export.precision.formats import FP8, GRIDS, INT8, W4, Grid
from mmd_export.precision.layers import layers, outermost
from mmd_export.precision.lower import lower, typed
from mmd_export.precision.quantise import Recipe, chosen_layers, on_grid, quantise
from mmd_export.precision.ranges import Histogram, histograms, rounded_scale
from mmd_export.precision.trajectory import Calls
from tests.models import weights_of
from tests.older import needs
from tests.precisions import Golden, calls_of, dtypes, hand_made, open_session, run, whole

# Largest error of the states of a random network with attention; measured, see each assertion for the margin.
LIMIT = {"int8": 0.2, "fp8": 0.5, "w8": 0.1, "w4": 0.6}


@pytest.fixture(scope="module")
def lowered(attention_calls: Calls) -> dict[str, ir.Model]:
    return {name: whole(lower(attention_calls, name)) for name in GRIDS}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_it_is_close_to_the_reference(grid: Grid, lowered: dict[str, ir.Model], attention_golden: Golden) -> None:
    if grid.name == "fp8":
        needs("onnxruntime", "1.32", "float8 goes through Transpose, which opset 20 has not")
    inputs, expected = attention_golden
    states = ("state.1", "state.2")
    for name, state in zip(states, run(lowered[grid.name], inputs, *states), strict=True):
        error = np.abs(state - expected[name]).max()
        assert LIMIT[grid.name] / 100 < error < LIMIT[grid.name], name


def test_integer_kernels_cannot_saturate(lowered: dict[str, ir.Model], tmp_path: Path) -> None:
    """Of int8 convolutions onnxruntime makes none; the weights of linear layers, where it may, have 7 bits."""
    open_session(lowered["int8"], tmp_path / "optimised.onnx")
    made = ir.load(tmp_path / "optimised.onnx").graph
    assert "QuantizeLinear" in {node.op_type for node in made}
    assert not any(node.op_type.startswith("QLinearConv") or node.op_type == "ConvInteger" for node in made)
    integers = [node for node in made if "Integer" in node.op_type]
    assert all(np.abs(constant(node.inputs[1]).astype(int)).max() <= 63 for node in integers)


def test_an_integer_product_is_exact(tiny: Path) -> None:
    """Activations and weights at the ends of their ranges: what saturates first."""
    calls = hand_made(
        [("MatMul", ["x", "w"], "y", {})], {"w": np.ones((64, 64), np.float32)},
        load_checkpoint(str(tiny)).plan_for(2), (2, 4, 64),
    )  # fmt: skip
    made = whole(quantise(replace(calls, model=typed(calls.model)), INT8, Recipe(ends=True, per_step=False), 2))
    scale = float(constant(made.graph.initializers["x/scale"]))
    for end in (-127, 127):
        noise = np.full((1, 2, 4, 64), end * scale, np.float32)
        (found,) = run(made, {"noise": noise}, "output.0")
        np.testing.assert_allclose(found, 64 * end * scale, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_its_types(grid: Grid, lowered: dict[str, ir.Model], tmp_path: Path) -> None:
    model = lowered[grid.name]
    assert faults(model, (), grid.name) == []
    with pytest.raises(NotAvailableError, match=r"int8 |int4 |float8e4m3fn "):
        require_clean(model)
    assert grid.dtype.name in dtypes(model)
    assert model.graph.opset_imports[""] == grid.opset
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("name", ["fp8", "w4", "int8"])
def test_another_implementation_agrees(name: str, tiny: Path) -> None:
    """onnx's own reference evaluator, on one convolution and one product."""
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((16, 2, 3, 3)).astype(np.float32),
        "v": generator.standard_normal((2, 16, 3, 3)).astype(np.float32),
    }
    nodes: list[Any] = [
        ("Conv", ["x", "w"], "h", {"pads": [1, 1, 1, 1]}),
        ("Conv", ["h", "v"], "y", {"pads": [1, 1, 1, 1]}),
    ]
    calls = hand_made(nodes, weights, load_checkpoint(str(tiny)).plan_for(2))
    calls = replace(calls, model=typed(calls.model))
    model = whole(quantise(calls, GRIDS[name], Recipe(ends=True), 2))
    inputs = {"noise": generator.standard_normal((1, 2, 4, 4)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(["state.1"], inputs)
    (found,) = run(model, inputs, "state.1", as_written=True)
    (exact,) = run(whole(hand_made(nodes, weights, calls.plan)), inputs, "state.1")
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(exact - expected).max() > 1e-3 * np.abs(expected).max()


def test_weights_are_stored_once(lowered: dict[str, ir.Model], tiny_attention: Path) -> None:
    data = {name: ir.to_proto(model).SerializeToString() for name, model in lowered.items()}
    found = 0
    for name, tensor in weights_of(tiny_attention).items():
        array = tensor.numpy()
        if array.ndim != 4 or "conv_in" in name or "conv_out" in name or "time" in name:
            continue
        found += 1
        scale = np.abs(array).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
        stored = np.rint(array / scale).astype(np.int8).tobytes()
        assert data["int8"].count(stored) == data["w8"].count(stored) == 1, name
        assert all(each.count(array.tobytes()) == 0 for each in data.values()), name
    assert found > 8


def test_first_and_last_stay_float(lowered: dict[str, ir.Model], attention_calls: Calls) -> None:
    found = layers(typed(attention_calls.model))
    ends = outermost(attention_calls.model, layers(attention_calls.model))
    assert len(found) > 10
    assert sorted(node.op_type for node in ends) == ["Conv", "Conv"]
    convs = [node for node in lowered["int8"].graph if node.op_type == "Conv"]
    plain = [node for node in convs if node.inputs[1] is not None and node.inputs[1].producer() is None]
    assert len(plain) == 2 * 2  # two, in each of two calls
    for node in convs:
        if node not in plain:
            for value in node.inputs[:2]:
                producer = None if value is None else value.producer()
                assert producer is not None
                assert producer.op_type == "DequantizeLinear"


@pytest.mark.parametrize(
    ("recipe", "more"),
    [(Recipe(ends=True), {"ends"}), (Recipe(linear=True), set()), (Recipe(linear=False), {"convolutions only"})],
    ids=["ends", "linear", "no linear"],
)
def test_what_a_recipe_chooses(recipe: Recipe, more: set[str], attention_calls: Calls) -> None:
    model = typed(attention_calls.model)
    everything, chosen = layers(model), chosen_layers(model, recipe)
    linear = [layer for layer in everything if not layer.convolution]
    assert linear
    expected = len(everything)
    expected -= 0 if "ends" in more else 2
    expected -= len(linear) if "convolutions only" in more or not recipe.linear else 0
    assert len(chosen) == expected


def test_a_linear_layer_behind_a_transpose_is_quantised(tiny: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    nodes: list[Any] = [("Transpose", ["w"], "t", {"perm": [1, 0]}), ("MatMul", ["x", "t"], "y", {})]
    calls = hand_made(nodes, {"w": weight}, load_checkpoint(str(tiny)).plan_for(2))
    made = quantise(replace(calls, model=typed(calls.model)), INT8, Recipe(ends=True), 2)
    assert [node.op_type for node in made.model.graph] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul",
    ]  # fmt: skip
    noise = {"noise": np.random.default_rng(1).standard_normal((1, 2, 4, 4)).astype(np.float32)}
    exact, found = (run(whole(each), noise, "state.1")[0] for each in (calls, made))
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["int8", "fp8", "w8"])
def test_what_a_product_adds_is_not_what_it_multiplies(name: str) -> None:
    """The third input of a Gemm stays as it is, though another layer quantises the same value."""
    calls, images = calls_of("python:tests.foreign_nets:Added"), 2 if GRIDS[name].activations else None
    made = lower(calls, name, images)
    before, after = (
        next(node for node in model.graph if node.op_type == "Gemm") for model in (calls.model, made.model)
    )
    assert [is_dequantised(value) for value in after.inputs] == [images is not None, True, False]
    assert name_of(after.inputs[2]) == name_of(before.inputs[2])
    noise = {"noise": np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)}
    exact, found = (run(whole(each), noise, "state.2")[0] for each in (calls, made))
    assert 0 < np.abs(found - exact).max() < LIMIT[name]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize(("network", "weight", "place"), [("TiedFirst", "first", 0), ("TiedLast", "last", -1)])
def test_a_layer_left_out_keeps_a_weight_that_it_shares(network: str, weight: str, place: int, grid: Grid) -> None:
    """Float32 for the first and the last layer, the grid for the other of the same weight."""
    calls = calls_of(f"python:tests.foreign_nets:{network}")
    made = lower(calls, grid.name, 2 if grid.activations else None)
    weights = weights_of_convolutions(made)
    assert [is_dequantised(each) for each in weights] == [False, True, False]
    assert name_of(weights[place]).endswith(f"{weight}.weight")
    noise = {"noise": np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)}
    exact, found = (run(whole(each), noise, "state.2")[0] for each in (calls, made))
    assert 0 < np.abs(found - exact).max() < LIMIT[grid.name]


def test_a_layer_that_stays_float32_keeps_a_weight_that_it_shares() -> None:
    """As ``--auto-promote`` asks for it: the other layer of the weight is on the grid."""
    calls = calls_of("python:tests.foreign_nets:TiedFirst")
    values = [name_of(node.outputs[0]) for node in calls.model.graph if node.op_type == "Conv"]
    made = lower(calls, "w8", recipe=Recipe(ends=True), float32=frozenset(values[1:2]))
    assert [is_dequantised(each) for each in weights_of_convolutions(made)] == [True, False, True]


def weights_of_convolutions(calls: Calls) -> list[ir.Value | None]:
    return [node.inputs[1] for node in calls.model.graph if node.op_type == "Conv"]


def is_dequantised(value: ir.Value | None) -> bool:
    """Whether a Reshape of blocks, or nothing, lies between it and a DequantizeLinear."""
    node = None if value is None else value.producer()
    return node is not None and (node.op_type == "DequantizeLinear" or is_dequantised(node.inputs[0]))


def name_of(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def test_ranges_come_from_every_step_of_the_trajectory(attention_calls: Calls) -> None:
    model = typed(attention_calls.model)
    values = list(dict.fromkeys(layer.activation for layer in layers(model)))[:4]
    found = histograms(replace(attention_calls, model=model), values, 3)
    assert len(found) == 2
    channels = attention_calls.shape[0] * attention_calls.shape[1] * attention_calls.shape[2]
    assert found[0][0].counts.sum() == found[1][0].counts.sum() == 3 * channels  # the state, unit normal
    assert found[0][0].largest != found[1][0].largest
    both = found[0][0] + found[1][0]
    assert both.largest == max(found[0][0].largest, found[1][0].largest)
    assert both.counts.sum() == 6 * channels


def test_a_range_for_each_step(attention_calls: Calls, attention_golden: Golden) -> None:
    made = lower(attention_calls, "int8", 4, Recipe(per_step=True))
    assert len(made.constants[0]) > len(attention_calls.constants[0])
    assert any(a != b for a, b in zip(made.constants[0], made.constants[1], strict=True) if np.ndim(a) == 0)
    model = whole(made)
    assert faults(model, (), "int8") == []
    inputs, expected = attention_golden
    assert np.abs(run(model, inputs, "state.2")[0] - expected["state.2"]).max() < LIMIT["int8"]


def test_the_same_input_gives_the_same_bytes(lowered: dict[str, ir.Model], attention_calls: Calls) -> None:
    for name in ("int8", "w4"):
        again = ir.to_proto(whole(lower(attention_calls, name))).SerializeToString(deterministic=True)
        assert again == ir.to_proto(lowered[name]).SerializeToString(deterministic=True)


# --- the arithmetic


def test_a_histogram_of_known_numbers() -> None:
    histogram = Histogram()
    histogram.add(np.array([0.0, 1.0, -1.0, 2.0, -8.0], np.float32))
    assert histogram.counts.sum() == 4  # zero is no range
    assert histogram.largest == 8.0
    assert histogram.limit("minmax", INT8) == 8.0


def test_an_outlier_is_clipped_where_that_is_right() -> None:
    generator = np.random.default_rng(0)
    histogram = Histogram()
    histogram.add(generator.standard_normal(200_000).astype(np.float32))
    histogram.add(np.array([100.0], np.float32))
    assert histogram.limit("minmax", INT8) == 100.0
    assert 3.5 < histogram.limit("percentile", INT8) < 4.2  # 3.89 sigma holds 99.99 %
    limit = histogram.limit("mse", INT8)
    assert 30.0 < limit < 60.0
    assert histogram.limit("mse", FP8) == 100.0  # a floating-point grid loses nothing by reach
    # the formula against the grid itself
    values = generator.standard_normal(200_000)
    for reach in (2.0, 4.0, 16.0):
        scale = reach / 127
        real = ((values - np.clip(np.rint(values / scale), -127, 127) * scale) ** 2).mean()
        plain = Histogram()
        plain.add(values.astype(np.float32))
        assert plain.squared_error(reach, INT8) / len(values) == pytest.approx(real, rel=0.05)


def test_an_activation_that_is_always_zero_has_a_scale() -> None:
    assert Histogram().limit("mse", INT8) == 1.0


@pytest.mark.parametrize("limit", [1e-6, 0.3, 1.0, 3.14159, 127.0, 1e5])
def test_a_scale_reaches_its_limit_and_ignores_the_last_bits(limit: float) -> None:
    scale = rounded_scale(limit, INT8)
    assert limit * (1 - 1e-4) <= float(scale) * 127 <= limit * 1.008
    assert rounded_scale(limit * (1 + 1e-7), INT8) == scale or rounded_scale(limit * (1 - 1e-7), INT8) == scale


def test_on_grid() -> None:
    values = np.array([-500.0, -1.5, -0.4, 0.5, 1.5, 300.0], np.float32)
    np.testing.assert_array_equal(on_grid(values, INT8), np.array([-127, -2, 0, 0, 2, 127], np.int8))
    np.testing.assert_array_equal(on_grid(values, W4).astype(int), [-7, -2, 0, 0, 2, 7])
    found = on_grid(np.array([1000.0, 447.0, 0.3], np.float32), FP8)
    assert found.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(found.astype(np.float32), [448.0, 448.0, 0.3125])


@pytest.mark.parametrize(
    ("seven_bits", "convolution", "linear"), [("none", 127, 127), ("linear", 127, 63), ("all", 63, 63)]
)
def test_weights_come_back_within_half_a_step(
    seven_bits: str, convolution: int, linear: int, attention_calls: Calls
) -> None:
    made = lower(attention_calls, "int8", 2, Recipe(seven_bits=seven_bits))
    originals = {layer.weight.name: layer for layer in layers(typed(attention_calls.model))}
    checked = []
    for node in made.model.graph:
        weight = node.inputs[0]
        if node.op_type == "DequantizeLinear" and weight is not None and weight.const_value is not None:
            original = originals[str(weight.name).removesuffix("/int8")]
            steps, array = weight.const_value.numpy().astype(int), constant(original.weight)
            others = tuple(i for i in range(array.ndim) if i != original.axis)
            scale = np.expand_dims(constant(node.inputs[1]), others)
            assert np.abs(steps * scale - array).max() <= 0.5 * scale.max() * (1 + 1e-5)
            assert (np.abs(steps).max(axis=others) == (convolution if original.convolution else linear)).all()
            checked.append(original.convolution)
    assert checked.count(True) > 10
    assert checked.count(False) > 10


def constant(value: ir.Value | None) -> np.ndarray[Any, Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def test_w4_stores_half_a_byte_a_weight(attention_calls: Calls) -> None:
    model = whole(lower(attention_calls, "w4"))
    four = [v.const_value for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT4]
    assert len(four) > 8
    assert all(tensor is not None and tensor.nbytes == -(-tensor.size // 2) for tensor in four)
    blocks = {node.attributes.get_int("block_size", 0) for node in model.graph if node.op_type == "DequantizeLinear"}
    assert max(blocks) <= 32
    assert any(block >= 8 for block in blocks)


# --- refusals


@pytest.mark.parametrize("precision", ["fp32", "w8", "w4"])
def test_calibration_where_nothing_is_calibrated(precision: str, attention_calls: Calls) -> None:
    with pytest.raises(UsageError, match=f"--calibration is 8, but --precision {precision} has no ranges"):
        lower(attention_calls, precision, 8)
