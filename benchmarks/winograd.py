"""3 x 3 convolutions split by minimal filtering, against whole ones -> benchmarks/results/winograd.json.

One layer a graph, batch 1, in onnxruntime on one thread and on two, interleaved. Errors are relative to the largest
output of the same convolution in float64, random images and weights. About 3 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from benchmarks.common import RESULTS, write_result
from mmd_export import onnx_winograd
from mmd_export.latency import REST, measure

# Channels in, channels out, side of the image; those of the ddpm-cifar10 architecture, and smaller and larger ones.
LAYERS = (
    (64, 64, 16), (256, 256, 4), (512, 512, 4), (128, 128, 16), (64, 64, 32), (256, 256, 8), (512, 256, 8),
    (128, 128, 32), (256, 256, 16), (256, 128, 32), (512, 256, 16), (320, 320, 64),
)  # fmt: skip
THREADS = (1, 2)
REPEATS = 20


def layer(channels: int, outputs: int, side: int) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weight = random.standard_normal((outputs, channels, 3, 3), np.float32) / (3 * channels**0.5)
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, count, side, side])
        for name, count in (("x", channels), ("y", outputs))
    )
    initializers = [numpy_helper.from_array(weight.astype(np.float32), "weight")]
    node = helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1] * 4, kernel_shape=[3, 3])
    graph = helper.make_graph([node], "layer", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same layer, however small."""
    least, onnx_winograd.LEAST_PRODUCTS = onnx_winograd.LEAST_PRODUCTS, 1
    try:
        changed = ir.from_proto(model)
        assert onnx_winograd.filter_rows(changed) == 1
        return ir.to_proto(changed)
    finally:
        onnx_winograd.LEAST_PRODUCTS = least


def opened(model: onnx.ModelProto, threads: int) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def exact(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float64]:
    weight = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64))
    y: NDArray[np.float64] = torch.nn.functional.conv2d(torch.from_numpy(x).double(), weight, padding=1).numpy()
    return y


def repeated(session: Any, x: NDArray[np.float32]) -> Callable[[], None]:
    """Runs in a row, as layers of a network follow one another: threads that have slept wake up only once."""

    def call() -> None:
        for _ in range(REPEATS):
            session.run(None, {"x": x})

    return call


def measure_layer(channels: int, outputs: int, side: int, rounds: int) -> dict[str, Any]:
    whole = layer(channels, outputs, side)
    models = {"whole": whole, "split": split(whole)}
    x = np.random.default_rng(1).standard_normal((1, channels, side, side), np.float32)
    y = exact(whole, x)
    errors: dict[str, float] = {}
    takes: dict[str, dict[str, Any]] = {}
    for threads in THREADS:
        sessions = {name: opened(model, threads) for name, model in models.items()}
        found = {name: session.run(None, {"x": x})[0] for name, session in sessions.items()}
        errors = {name: float(np.abs(output - y).max() / np.abs(y).max()) for name, output in found.items()}
        calls = {name: repeated(session, x) for name, session in sessions.items()}
        takes[str(threads)] = vars(measure(calls, rounds, warmup=10, rest=REST).ratio("whole", "split"))
    row: dict[str, Any] = {
        "channels": channels, "outputs": outputs, "side": side, "products": 9 * channels * outputs * side**2,
        "relative_error": errors, "whole_takes_of_split": takes,
    }  # fmt: skip
    print(channels, outputs, side, {threads: round(take["median"], 2) for threads, take in takes.items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "winograd.json")
    arguments = parser.parse_args()
    rows = [measure_layer(*shape, arguments.rounds) for shape in LAYERS]
    rows.sort(key=lambda row: row["products"])
    write_result(
        arguments.out, "benchmarks/winograd.py", {"least_products": onnx_winograd.LEAST_PRODUCTS, "rows": rows}
    )


if __name__ == "__main__":
    main()
