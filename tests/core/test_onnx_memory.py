"""Peak activation memory: small graphs whose answer can be counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmd_export.build import BuildOptions, build
from mmd_export.network_options import NetworkOptions
from mmd_export.onnx_memory import peak_activation_bytes

FLOAT, BYTES = TensorProto.FLOAT, 4


def model(nodes: list[Any], shape: list[int | str], weights: list[Any] | None = None) -> ir.Model:
    """x -> y, both of ``shape``."""
    x, y = (helper.make_tensor_value_info(name, FLOAT, shape) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights or [])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def relu(before: str, after: str) -> Any:
    return helper.make_node("Relu", [before], [after])


def test_a_chain_holds_two_values() -> None:
    chain = [relu("x", "a"), relu("a", "b"), relu("b", "y")]
    assert peak_activation_bytes(model(chain, [2, 5])) == 2 * 10 * BYTES


def test_a_value_that_is_read_later_stays() -> None:
    nodes = [relu("x", "a"), relu("a", "b"), helper.make_node("Add", ["x", "b"], ["y"])]
    assert peak_activation_bytes(model(nodes, [10])) == 3 * 10 * BYTES  # x, a, b; then x, b, y


def test_weights_do_not_count_and_unused_values_go_at_once() -> None:
    weight = numpy_helper.from_array(np.ones(10, np.float32), "w")
    nodes = [relu("x", "unused"), helper.make_node("Add", ["x", "w"], ["y"])]
    assert peak_activation_bytes(model(nodes, [10], [weight])) == 2 * 10 * BYTES


def test_what_is_computed_from_weights_counts_only_where_no_runtime_does_it_at_loading() -> None:
    weight, scale = (
        numpy_helper.from_array(np.ones(10, np.float32), "w"),
        numpy_helper.from_array(np.array(1, np.float32), "s"),
    )
    whole = [relu("w", "v"), helper.make_node("Add", ["x", "v"], ["y"])]
    assert peak_activation_bytes(model(whole, [10], [weight])) == 2 * 10 * BYTES
    bytes_ = numpy_helper.from_array(np.ones(10, np.int8), "w")
    quantised = [helper.make_node("DequantizeLinear", ["w", "s"], ["v"]), *whole[1:]]
    assert peak_activation_bytes(model(quantised, [10], [bytes_, scale])) == 3 * 10 * BYTES


def test_a_symbolic_batch_counts_as_the_given_one() -> None:
    assert peak_activation_bytes(model([relu("x", "y")], ["batch", 3]), batch=4) == 2 * 12 * BYTES


def test_what_is_twice_the_batch_counts_twice() -> None:
    twice = [
        helper.make_node("Concat", ["x", "x"], ["a"], axis=0),
        relu("a", "b"),
        helper.make_node("Split", ["b"], ["y", "z"], num_outputs=2, axis=0),
    ]
    for batch in (1, 4):
        assert peak_activation_bytes(model(twice, ["batch", 3]), batch) == (2 + 2) * 3 * batch * BYTES


@pytest.mark.parametrize("form", ["unrolled", "loop"])
def test_a_range_of_batches_needs_what_its_smallest_needs(form: str, tmp_path: Path) -> None:
    """Guidance calls the network on two copies of the batch; inside a loop shapes are inferred too."""
    guided = NetworkOptions(guidance_scale=3.0, null_label=0, guidance_form="doubled")
    peaks = []
    for i, batch in enumerate(("2", "2,5")):
        options = BuildOptions(
            "python:tests.foreign_nets:Labelled", "onnx", tmp_path / str(i), steps=2, batch=batch, form=form,
            verify=False, network=guided,
        )  # fmt: skip
        peaks.append(build(options).manifest.graph.peak_activation_bytes)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a_loop_counts_its_body_once_and_nothing_of_the_outside_twice() -> None:
    info = helper.make_tensor_value_info
    inner = [helper.make_node("Identity", ["going"], ["goes"]), relu("carried", "a")]
    inner.append(helper.make_node("Add", ["a", "x"], ["next"]))
    given = [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("carried", FLOAT, [10])]
    body = helper.make_graph(inner, "body", given, [info("goes", TensorProto.BOOL, []), info("next", FLOAT, [10])])
    trips = helper.make_tensor("trips", TensorProto.INT64, [], [3])
    loop = helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)
    outside, inside, goes = 2 * 10 * BYTES, 2 * 10 * BYTES, 1  # x, y; carried, a; an output, while i is never read
    assert peak_activation_bytes(model([loop], [10], [trips])) == outside + inside + goes
