"""Self-attention with channels first: the formula in float64, real networks, and hands off everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import load_checkpoint
from mmd_export.folders import scratch_folder
from mmd_export.onnx_attention import keep_channels_first, projections
from mmd_export.onnx_calls import exact_calls
from mmd_export.precision.trajectory import open_model
from mmd_export.program import export_program
from tests.models import ATTENTION, save_model

RNG = np.random.default_rng(0)
CHANNELS, PLACES = 8, 6


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_projections_make_the_same_attention(heads: int) -> None:
    """Against softmax(Q K^T / sqrt(d)) V, written with tokens first as in Vaswani et al. 2017."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (CHANNELS, CHANNELS))
    shapes |= dict.fromkeys(("b_q", "b_k", "b_v", "b_o", "gamma", "beta"), (CHANNELS,))
    w = {name: RNG.standard_normal(shape) for name, shape in shapes.items()}
    x, width = RNG.standard_normal((CHANNELS, PLACES)), CHANNELS // heads
    tokens = (x * w["gamma"][:, None] + w["beta"][:, None]).T
    q, k, v = (tokens @ w[f"w_{name}"].T + w[f"b_{name}"] for name in "qkv")
    parts = [slice(start, start + width) for start in range(0, CHANNELS, width)]
    mixed = [softmax(q[:, part] @ k[:, part].T / width**0.5) @ v[:, part] for part in parts]
    expected = (np.concatenate(mixed, axis=1) @ w["w_o"].T + w["b_o"]).T

    made = projections(w, width**-0.25, heads)
    first = made.first @ x + made.offset
    queries, keys, values = (first, x, x) if heads == 1 else np.split(first, 3)
    parts = [slice(None)] if heads == 1 else parts
    mean = [values[part] @ softmax(queries[part].T @ keys[part]).T for part in parts]
    np.testing.assert_allclose(made.last @ np.concatenate(mean) + made.bias, expected, rtol=1e-10)


def call_of(model: Path, batch: int | None) -> ir.Model:
    checkpoint = load_checkpoint(str(model))
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, batch)
    return exact_calls(program).model


def run(model: ir.Model) -> NDArray[np.float32]:
    """Two images, one after the other where the batch is 1; the same at every call."""
    given = np.random.default_rng(1)
    with scratch_folder() as folder:
        session = open_model(model, folder)
        feeds = {
            value.name: given.standard_normal(
                [2 if isinstance(size, str) else size for size in value.shape], np.float32
            )
            for value in session.get_inputs()
        }
        output: NDArray[np.float32] = session.run(None, feeds)[0]
        return output


def count(model: ir.Model, *op_types: str) -> int:
    return sum(node.op_type in op_types for node in model.graph)


@pytest.mark.parametrize(("head_dim", "heads", "batch"), [(None, 1, None), (8, 2, None), (4, 4, 1)])
def test_networks_give_the_same_numbers(head_dim: int | None, heads: int, batch: int | None, tmp_path: Path) -> None:
    model = call_of(save_model(tmp_path / "model", attention_head_dim=head_dim, **ATTENTION), batch)
    expected, before = run(model), count(model, "MatMul")
    blocks = count(model, "Softmax")
    assert blocks == 4
    assert keep_channels_first(model) == blocks
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)
    assert before - count(model, "MatMul") == 2 * blocks
    turned = [list(node.attributes["perm"].as_ints()) for node in model.graph if node.op_type == "Transpose"]
    assert turned == ([[0, 2, 1]] if heads == 1 else [[0, 1, 3, 2]]) * 2 * blocks


def test_networks_without_it_stay(tiny: Path) -> None:
    model = call_of(tiny, 1)
    before = ir.to_proto(model).SerializeToString()
    assert keep_channels_first(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("tied", [False, True])
def test_attentions_that_share_weights_stay_apart(tied: bool, tmp_path: Path) -> None:
    """Equal biases, all zero as they begin, are one initialiser; of tied blocks everything is."""
    folder = save_model(tmp_path / "model", **ATTENTION)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    first = "down_blocks.1.attentions.0."
    for name in weights:
        if tied and ".attentions." in name:
            weights[name] = weights[first + name.partition(".attentions.")[2].partition(".")[2]].clone()
        elif name.endswith("to_q.bias"):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, path)
    model = call_of(folder, 1)
    expected = run(model)
    assert keep_channels_first(model) == 4
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)


def attention(heads: int = 2, keys: tuple[int, ...] | None = None, **given: NDArray[np.float32]) -> ir.Model:
    """The pattern by hand: two images of 8 channels and 8 places; ``given`` replaces weights."""
    width = CHANNELS // heads
    text = f"""
<ir_version: 10, opset_import: ["" : 20]>
attention (float[2, {CHANNELS}, {CHANNELS}] x) => (float[2, {CHANNELS}, 2, {CHANNELS // 2}] y)
{{
    s = Mul (x, gamma) n = Add (s, beta) t = Transpose <perm = [0, 2, 1]> (n)
    q0 = MatMul (t, wq) q1 = Add (q0, bq) q2 = Reshape (q1, split) q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (t, wk) k1 = Add (k0, bk) k2 = Reshape (k1, split) k = Transpose <perm = [0, 2, 1, 3]> (k2)
    v0 = MatMul (t, wv) v1 = Add (v0, bv) v2 = Reshape (v1, split) v = Transpose <perm = [0, 2, 1, 3]> (v2)
    k3 = Reshape (k, keys) k4 = Transpose <perm = [0, 2, 1]> (k3) k5 = Reshape (k4, turned)
    qs = Mul (q, scale) ks = Mul (k5, scale) a = MatMul (qs, ks) b = Softmax <axis = -1> (a) m = MatMul (b, v)
    m1 = Transpose <perm = [0, 2, 1, 3]> (m) m2 = Reshape (m1, joined) o = MatMul (m2, wo) p = Add (o, bo)
    u = Transpose <perm = [0, 2, 1]> (p) y = Reshape (u, image)
}}"""
    model = onnx.parser.parse_model(text)
    arrays: dict[str, NDArray[Any]] = {name: random(CHANNELS, 1) for name in ("gamma", "beta")}
    arrays |= {name: random(CHANNELS, CHANNELS) / 3 for name in ("wq", "wk", "wv", "wo")}
    arrays |= {name: random(CHANNELS) for name in ("bq", "bk", "bv", "bo")}
    arrays |= {
        "scale": np.float32(width**-0.25).reshape(1), "split": np.array([2, CHANNELS, heads, width]),
        "keys": np.array(keys or (2 * heads, CHANNELS, width)), "turned": np.array([2, heads, width, CHANNELS]),
        "joined": np.array([2, CHANNELS, CHANNELS]), "image": np.array([2, CHANNELS, 2, CHANNELS // 2]),
    }  # fmt: skip
    for name, array in (arrays | given).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_pattern_by_hand_is_one(heads: int) -> None:
    model = attention(heads)
    expected = run(model)
    assert keep_channels_first(model) == 1
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        attention(gamma=random(CHANNELS)),
        attention(gamma=np.array(2, np.float32)),
        attention(beta=random(1, CHANNELS)),
        attention(gamma=random(2, 1, 1)),
        attention(bq=random(CHANNELS, 1)),
        attention(keys=(4, 4, CHANNELS)),
        attention(wq=random(2, CHANNELS, CHANNELS)),
        attention(scale=random(CHANNELS, 1)),
    ],
    ids=["gamma of places", "one gamma", "beta of places", "gamma of images", "bias of places", "keys in another order",
         "weights of images", "scale of places"],
)  # fmt: skip
def test_it_leaves_alone_what_it_does_not_know(other: ir.Model) -> None:
    before = ir.to_proto(other).SerializeToString()
    assert keep_channels_first(other) == 0
    assert ir.to_proto(other).SerializeToString() == before


def test_the_target_does_so_in_float32_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", **ATTENTION)
    counts = {}
    for precision in ("fp32", "fp16"):
        options = BuildOptions(str(folder), "onnx", tmp_path / precision, precision, steps=1, verify=False)
        counts[precision] = build(options).manifest.graph.op_counts
    assert counts["fp32"]["Transpose"] == counts["fp32"]["Softmax"] * 2  # queries and scores
    assert counts["fp16"]["Transpose"] > counts["fp16"]["Softmax"] * 2
