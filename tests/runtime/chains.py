"""A chain made by hand: state.1 = a noise + W noise + z, state.2 = b state.1 + W state.1 + W noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mmd_export.bundle import (
    BatchSpec,
    Bundle,
    CheckpointRef,
    GraphInfo,
    ManifestDraft,
    TensorSpec,
    Tolerance,
    write_bundle,
)
from mmd_export.noise import sampler_noise

W = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
A, B = np.float32(0.5), np.float32(0.25)
IMAGE = (1, 2, 4)
Array = np.ndarray[Any, Any]


def reference(noise: Array, step_noise: Array) -> dict[str, Array]:
    """The chain in float64; the second step is a multistep update that reads ``output.1`` again."""
    x, z, w = noise.astype(np.float64), step_noise.astype(np.float64), W.astype(np.float64)
    output = x @ w
    one = A * x + output + z[0]
    two = B * one + one @ w + output
    return {"state.1": one, "state.2": two, "sample": np.clip(two, -1, 1)}


def chain_model(batch: int | str, broken: str = "") -> ModelProto:
    shape, float32 = [batch, *IMAGE], TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["noise", "w"], ["output.1"]),
        helper.make_node("Mul", ["noise", "a"], ["scaled"]),
        helper.make_node("Add", ["scaled", "output.1"], ["clean"]),
        helper.make_node("Gather", ["step_noise", "zero"], ["z"], axis=0),
        helper.make_node("Add", ["clean", "z"], ["state.1"]),
        helper.make_node("MatMul", ["state.1", "w"], ["output.2"]),
        helper.make_node("Mul", ["state.1", "b"], ["scaled.2"]),
        helper.make_node("Add", ["scaled.2", "output.2"], ["partial"]),
        helper.make_node("Add", ["partial", "output.1"], ["last" if broken == "unnamed" else "state.2"]),
        helper.make_node("Clip", ["last" if broken == "unnamed" else "state.2", "low", "high"], ["sample"]),
    ]
    scalars = {"a": A, "b": B, "low": np.float32(-1), "high": np.float32(1), "zero": np.int64(0)}
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info("noise", float32, shape),
            helper.make_tensor_value_info("step_noise", float32, [1, *shape]),
        ],
        [helper.make_tensor_value_info("sample", float32, shape)],
        [numpy_helper.from_array(W, "w"), *(numpy_helper.from_array(np.array(v), n) for n, v in scalars.items())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def make(out: Path, batch: BatchSpec, *, external: bool = False, broken: str = "") -> Bundle:
    size: Any = batch.smallest if batch.is_static else "batch"
    inputs = sampler_noise(3, 8, IMAGE, 1)
    golden = inputs | {name: array.astype(np.float32) for name, array in reference(**inputs).items()}
    draft = ManifestDraft(
        name="chain-2",
        target="onnx",
        format="onnx",
        artefact="model.onnx",
        precision="fp32",
        plan={"steps": [{}, {}]},
        inputs=(
            TensorSpec(name="noise", dtype="float32", shape=(size, *IMAGE)),
            TensorSpec(name="step_noise", dtype="float32", shape=(1, size, *IMAGE)),
        ),
        outputs=(TensorSpec(name="sample", dtype="float32", shape=(size, *IMAGE)),),
        batch=batch,
        checkpoint=CheckpointRef(name="by hand", sha256="0" * 64),
        toolchain={"onnx": onnx.__version__},
        tolerance=Tolerance(atol=1e-5, reason="two float32 products of length 4"),
        graph=GraphInfo(nodes=10, unique_weight_bytes=64, op_counts={}),
    )

    def write(folder: Path) -> None:
        path = folder / "model.onnx"
        if external:
            onnx.save_model(
                chain_model(size), path, save_as_external_data=True, location="model.onnx_data", size_threshold=16
            )
        else:
            path.write_bytes(chain_model(size, broken).SerializeToString())
        if broken == "truncated":
            path.write_bytes(path.read_bytes()[:200])
        if broken == "garbage":
            path.write_bytes(b"\x80\x04 not a model")

    return write_bundle(out, draft, write, golden, "# chain\n")


def close(found: Array, expected: Array) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def noises(count: int) -> dict[str, Array]:
    return dict(sampler_noise(9, count, IMAGE, 1))
