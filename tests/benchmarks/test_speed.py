"""What the speed benchmark counts in onnxruntime's optimised graph."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.speed import reorders
from benchmarks.speed_tables import pipeline_rows


def convolutions(between: str) -> bytes:
    """Two convolutions in a row, wide enough for the blocked layout, with one operator between them."""
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node(between, ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shape = [1, 16, 8, 8]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


def test_reorders_are_counted() -> None:
    """In and out of the blocked layout once; an operator that has none of it stands between two more."""
    once = reorders(convolutions("Relu"))
    assert once in (0, 2)  # 0 on a processor for which onnxruntime has no blocked layout
    assert reorders(convolutions("Erf")) == 2 * once
    assert reorders(convolutions("Erf"), "EXTENDED") == 0


def test_the_table_shows_them_if_they_were_counted() -> None:
    takes = {"median": 1.5, "low": 1.4, "high": 1.6}
    rates = {"one graph": 150.0, "sgemm in onnxruntime": 200.0}
    values = {"takes": {"torch eager": takes}, "fraction_of_sgemm_roofline": 0.5, "best_gflops": rates}
    _, rows = pipeline_rows({"models": {"small": values}})
    assert rows[1:] == [
        ("*one graph, of the sgemm roofline*", "50 %"),
        ("*one graph, of onnxruntime's own sgemm*", "75 %"),
    ]
    _, rows = pipeline_rows({"models": {"small": {**values, "reorders": {"one graph": 1234}}}})
    assert rows[-1] == ("*layout reorders: one graph*", "1,234")
