"""Convolutions moved before a nearest-neighbour upsampling: the same numbers, and hands off everything else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mmd_export import onnx_upsample
from mmd_export.onnx_upsample import convolve_before_upsampling, phase_kernel

RNG = np.random.default_rng(0)
NEAREST = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
PADDED = "pads = [1, 1, 1, 1]"


def graph(
    weight: tuple[int, ...], resize: str = NEAREST, conv: str = PADDED, more: str = "", factor: int = 2
) -> ir.Model:
    """(N, 4, 3, 5) images, resized, then a convolution with a bias; ``more``: nodes behind it."""
    size = f"{3 * factor}, {5 * factor}"
    text = f"""
<ir_version: 10, opset_import: ["" : 20]>
upsample (float[batch, 4, 3, 5] x) => (float[batch, {weight[0]}, {size}] y)
<float[4] factors = {{1.0, 1.0, {factor}.0, {factor}.0}}, float[batch, 4, {size}] large>
{{
    large = Resize <{resize}> (x, , factors)
    y = Conv <{conv}> (large, weight, bias)
    {more}
}}"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("weight", weight), ("bias", weight[:1])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(RNG.standard_normal(shape, np.float32), name))
    return ir.from_proto(model)


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_upsample, "LEAST_SAVED", 1)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return y


@pytest.mark.parametrize(
    ("weight", "conv"),
    [
        ((6, 4, 3, 3), PADDED),
        ((6, 2, 3, 3), f"{PADDED}, group = 2, strides = [1, 1], dilations = [1, 1]"),
        ((3, 4, 5, 5), "pads = [2, 2, 2, 2]"),
        ((3, 4, 7, 7), "pads = [3, 3, 3, 3]"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_gives_the_same_numbers_with_fewer_products(weight: tuple[int, ...], conv: str, batch: int) -> None:
    model, x = graph(weight, conv=conv), RNG.standard_normal((batch, 4, 3, 5), np.float32)
    expected = run(model, x)
    assert convolve_before_upsampling(model) == 1
    np.testing.assert_allclose(run(model, x), expected, atol=2e-5)
    assert {node.op_type for node in model.graph} == {"Conv", "Reshape", "Concat"}
    kernels = [node.inputs[1].const_value.shape.numpy() for node in model.graph if node.op_type == "Conv"]  # type: ignore[union-attr]
    half = (weight[2] + 1) // 2
    assert kernels == [(*weight[:2], half, half)] * 4


@pytest.mark.parametrize(
    "other",
    [
        graph((6, 4, 3, 3), resize=NEAREST.replace("nearest", "linear", 1)),
        graph((6, 4, 3, 3), resize=NEAREST.replace("asymmetric", "align_corners")),
        graph((6, 4, 3, 3), resize=NEAREST.replace("floor", "ceil")),
        graph((6, 4, 3, 3), factor=3),
        graph((6, 4, 1, 1), conv="pads = [0, 0, 0, 0]"),
        graph((6, 4, 4, 4), conv="pads = [1, 1, 2, 2]"),
        graph((6, 4, 3, 3), conv="pads = [2, 2, 2, 2], dilations = [2, 2]"),
        graph((6, 4, 3, 3), conv='auto_pad = "SAME_UPPER"'),
        graph((6, 4, 3, 3), more="z = Relu (large)"),
    ],
    ids=["linear", "corners", "ceil", "by 3", "1 x 1", "4 x 4", "dilated", "padding to be inferred", "read twice"],
)
def test_it_leaves_alone_what_it_does_not_know(other: ir.Model) -> None:
    before = ir.to_proto(other).SerializeToString()
    assert convolve_before_upsampling(other) == 0
    assert ir.to_proto(other).SerializeToString() == before


def test_it_leaves_alone_what_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = (36 - 16) * 6 * 4 * 3 * 5
    for least, count in ((saved, 1), (saved + 1, 0)):
        monkeypatch.setattr(onnx_upsample, "LEAST_SAVED", least)
        assert convolve_before_upsampling(graph((6, 4, 3, 3))) == count


def test_the_sums_of_weights_meet_on_four_pixels() -> None:
    weight = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    kernel, pads = phase_kernel(weight, (0, 1))
    assert pads == [1, 0, 0, 1]
    np.testing.assert_array_equal(kernel[0, 0], [[0 + 1, 2], [3 + 4 + 6 + 7, 5 + 8]])
