"""Convolutions by minimal filtering: the same numbers with fewer products, and hands off everything else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mmd_export import onnx_winograd
from mmd_export.onnx_memory import fixed_values, peak_activation_bytes
from mmd_export.onnx_winograd import filter_rows, filtering

RNG = np.random.default_rng(0)
PADDED = "pads = [1, 1, 1, 1]"
CHANNELS, OUTPUTS = 32, 16


def graph(
    height: int = 8, conv: str = PADDED, more: str = "y = Identity (h)", kernel: int = 3, channels: int = CHANNELS,
    bias: str = ", bias", batch: int | str = "batch",
    group: int = 1,
) -> ir.Model:  # fmt: skip
    """(N, 32, H, 5) images through one convolution; ``more``: nodes from its output h to y."""
    text = f"""
<ir_version: 10, opset_import: ["" : 20]>
layer (float[{batch}, {channels}, {height}, 5] x) => (float[n, o, a, b] y)
{{
    h = Conv <{conv}> (x, weight{bias})
    {more}
}}"""
    model = onnx.parser.parse_model(text)
    weight = RNG.standard_normal((OUTPUTS, channels // group, kernel, kernel), np.float32) / (kernel * channels**0.5)
    for name, array in {
        "weight": weight.astype(np.float32),
        "bias": weight[:, 0, 0, 0],
        "time": RNG.standard_normal((1, OUTPUTS, 1, 1), np.float32),
        "pixels": RNG.standard_normal((1, 1, height, 5), np.float32),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_winograd, "LEAST_PRODUCTS", 1)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    y: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return y


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.all_nodes())


@pytest.mark.parametrize("rows", [2, 4])
def test_filtering_is_correlation_with_three_weights(rows: int) -> None:
    """F(m, 3) on random rows, against numpy's own correlation in float64."""
    found = filtering(rows)
    image, kernel = RNG.standard_normal(rows + 2), RNG.standard_normal(3)
    products = (found.of_kernel @ kernel) * (found.of_image @ image)
    np.testing.assert_allclose(found.of_output @ products, np.correlate(image, kernel), rtol=1e-12)
    assert len(products) == rows + 2


@pytest.mark.parametrize(("height", "rows"), [(16, 4), (8, 4), (4, 2), (6, 2), (12, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_gives_the_same_numbers_with_fewer_products(height: int, rows: int, batch: int) -> None:
    model, x = graph(height), RNG.standard_normal((batch, CHANNELS, height, 5), np.float32)
    expected = run(model, x)
    assert filter_rows(model) == 1
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)
    (main,) = [node for node in model.graph if node.op_type == "Conv" and node.attributes["group"].as_int() == rows + 2]
    assert list(main.attributes["kernel_shape"].as_ints()) == [1, 3]
    assert count(model, "Conv") == rows + 3


@pytest.mark.parametrize("more", ["y = Add (h, time)", "y = Add (time, h)"])
@pytest.mark.parametrize("bias", ["", ", bias"])
def test_what_is_added_to_each_channel_joins_the_bias(more: str, bias: str) -> None:
    model, x = graph(more=more, bias=bias), RNG.standard_normal((1, CHANNELS, 8, 5), np.float32)
    expected = run(model, x)
    assert filter_rows(model) == 1
    assert count(model, "Add") == 0
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "more", ["y = Add (h, pixels)", "z = Add (h, time) y = Mul (z, h)"], ids=["of pixels", "read twice"]
)
def test_other_additions_stay(more: str) -> None:
    model, x = graph(more=more), RNG.standard_normal((1, CHANNELS, 8, 5), np.float32)
    expected = run(model, x)
    assert filter_rows(model) == 1
    assert count(model, "Add") == 1
    np.testing.assert_allclose(run(model, x), expected, atol=2e-5)


@pytest.mark.parametrize(
    "other",
    [
        graph(conv=f"{PADDED}, strides = [2, 2]"),
        graph(conv="pads = [2, 2, 2, 2], dilations = [2, 2]"),
        graph(conv=f"{PADDED}, group = 2", group=2),
        graph(conv="pads = [0, 0, 0, 0]"),
        graph(conv='auto_pad = "SAME_UPPER"'),
        graph(kernel=5, conv="pads = [2, 2, 2, 2]"),
        graph(channels=24),
        graph(height=7),
        graph(height=2),
    ],
    ids=[
        "strides",
        "dilated",
        "grouped",
        "no padding",
        "padding to be inferred",
        "5 x 5",
        "24 wide",
        "odd",
        "2 rows",
    ],
)
def test_it_leaves_alone_what_it_does_not_know(other: ir.Model) -> None:
    before = ir.to_proto(other).SerializeToString()
    assert filter_rows(other) == 0
    assert ir.to_proto(other).SerializeToString() == before


def test_it_leaves_alone_what_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    products = 9 * CHANNELS * OUTPUTS * 8 * 5
    for least, layers in ((products, 1), (products + 1, 0)):
        monkeypatch.setattr(onnx_winograd, "LEAST_PRODUCTS", least)
        assert filter_rows(graph()) == layers


def test_one_weight_at_two_heights_has_two_forms() -> None:
    half = "p = AveragePool <kernel_shape = [2, 1], strides = [2, 1]> (x) g = Conv <pads = [1, 1, 1, 1]> (p, weight)"
    model = graph(more=f'{half} t = Resize <mode = "nearest"> (g, , twice) y = Add (h, t)')
    model.graph.register_initializer(ir.Value(name="twice", const_value=ir.tensor(np.array([1, 1, 2, 1], np.float32))))
    x = RNG.standard_normal((1, CHANNELS, 8, 5), np.float32)
    expected = run(model, x)
    assert filter_rows(model) == 2
    np.testing.assert_allclose(run(model, x), expected, atol=2e-5)


def test_a_convolution_that_the_graph_gives_keeps_its_name_and_its_addition() -> None:
    model, x = graph(more="y = Add (h, time)"), RNG.standard_normal((1, CHANNELS, 8, 5), np.float32)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Conv").outputs[0])
    expected = run(model, x)
    assert filter_rows(model) == 1
    assert [value.name for value in model.graph.outputs] == ["y", "h"]
    assert count(model, "Add") == 1
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)


def test_a_weight_is_transformed_once_and_stored_as_it_was() -> None:
    """Two convolutions with one weight: one transform, computed from that weight alone, which is no activation."""
    model = graph(more="b = Conv <pads = [1, 1, 1, 1]> (x, weight) y = Add (h, b)", batch=1)
    stored = model.graph.initializers["weight"].const_value
    before = peak_activation_bytes(model)
    assert filter_rows(model) == 2
    assert model.graph.initializers["weight"].const_value is stored
    transforms = [node for node in model.graph if fixed_values(model.graph).issuperset(node.outputs)]
    assert [node.op_type for node in transforms] == ["MatMul", "Transpose", "Reshape"]
    transformed = 6 * OUTPUTS * CHANNELS * 3 * 4
    assert peak_activation_bytes(model) < before + transformed
