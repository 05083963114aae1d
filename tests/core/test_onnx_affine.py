"""Times gamma plus beta in one pass: the same bits, and hands off everything else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mmd_export.onnx_affine import scale_and_shift_at_once

RNG = np.random.default_rng(0)


def graph(nodes: str, image: str = "batch, 4, 3, 5") -> ir.Model:
    text = f"""
<ir_version: 10, opset_import: ["" : 20]>
affine (float[{image}] x) => (float[{image}] y)
{{ {nodes} }}"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("gamma", (4, 1, 1)), ("beta", (1, 4, 1, 1)), ("g", (4, 1)), ("b", (4, 1)), ("rows", (3, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(RNG.standard_normal(shape, np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return y


@pytest.mark.parametrize(
    ("nodes", "image", "shape"),
    [
        ("h = Mul (x, gamma) y = Add (h, beta)", "batch, 4, 3, 5", (2, 4, 3, 5)),
        ("h = Mul (x, g) y = Add (h, b)", "1, 4, 6", (1, 4, 6)),
    ],
)
def test_one_node_gives_the_same_numbers(nodes: str, image: str, shape: tuple[int, ...]) -> None:
    model, x = graph(nodes, image), RNG.standard_normal(shape, np.float32)
    expected = run(model, x)
    assert scale_and_shift_at_once(model) == 1
    assert [node.op_type for node in model.graph] == ["BatchNormalization"]
    np.testing.assert_array_equal(run(model, x), expected)


@pytest.mark.parametrize(
    "nodes",
    [
        "h = Mul (x, rows) y = Add (h, beta)",
        "h = Mul (x, gamma) y = Add (h, rows)",
        "h = Mul (x, gamma) y = Add (h, x)",
        "h = Mul (x, gamma) z = Add (h, beta) y = Mul (z, h)",
        "h = Div (x, gamma) y = Add (h, beta)",
    ],
    ids=["scale of rows", "shift of rows", "another image", "read twice", "a division"],
)
def test_it_leaves_alone_what_it_does_not_know(nodes: str) -> None:
    model = graph(nodes)
    before = ir.to_proto(model).SerializeToString()
    assert scale_and_shift_at_once(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_a_product_that_the_graph_gives_stays() -> None:
    model = graph("h = Mul (x, gamma) y = Add (h, beta)")
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Mul").outputs[0])
    assert scale_and_shift_at_once(model) == 0
