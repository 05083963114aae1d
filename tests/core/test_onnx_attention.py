"""Self-attention with channels first: the formula in float64, real networks, and hands off everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mmd_export.checkpoint import load_checkpoint
from mmd_export.folders import scratch_folder
from mmd_export.onnx_attention import keep_channels_first, projections
from mmd_export.onnx_calls import exact_calls
from mmd_export.precision.trajectory import open_model
from mmd_export.program import export_program
from tests.models import save_model

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


@pytest.mark.parametrize(("head_dim", "heads"), [(None, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("batch", [1, None])
def test_networks_give_the_same_numbers(head_dim: int | None, heads: int, batch: int | None, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "add_attention": True,
    }
    model = call_of(save_model(tmp_path / "model", attention_head_dim=head_dim, **changes), batch)
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
