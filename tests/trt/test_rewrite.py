"""What TensorRT-RTX is given instead of a graph that it fails on computes the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mmd_export.checkpoint import load_checkpoint
from mmd_export.program import export_program
from mmd_export.targets import CompileOptions, get_target
from mmd_export.trt.rewrite import rewritten


def graph(precision: str, form: str, folder: Path) -> Path:
    """Two steps of digits, whose attention has three products of one value."""
    checkpoint = load_checkpoint("digits")
    program = export_program(checkpoint.denoiser, checkpoint.plan_for(2), checkpoint.shape, 1)
    get_target("onnx").compile(program, folder, CompileOptions(precision, form=form))
    return folder / "model.onnx"


def sample(path: Path) -> np.ndarray:
    """As written: onnxruntime's own fusions would round differently in the two."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32)
    (found,) = session.run(["sample"], {"noise": noise})
    return np.asarray(found)


def dequantised_weights(path: Path) -> list[ir.Node]:
    """Of matrix products, in the graph and the bodies of its loops."""
    nodes = [
        node for node in ir.load(path).graph.all_nodes() if node.op_type == "MatMul" and node.inputs[1] is not None
    ]
    made = [node.inputs[1].producer() for node in nodes if node.inputs[1] is not None]
    return [node for node in made if node is not None and node.op_type == "DequantizeLinear"]


@pytest.mark.parametrize(("form", "left"), [("loop", 3), ("unrolled", 8)])
def test_it_computes_the_same(form: str, left: int, tmp_path: Path) -> None:
    whole = graph("w8", form, tmp_path)
    before = whole.read_bytes()
    (folder := tmp_path / "rewritten").mkdir()
    other = rewritten(whole, folder)
    assert whole.read_bytes() == before
    assert other.parent == folder
    np.testing.assert_allclose(sample(other), sample(whole), atol=1e-6)
    found = dequantised_weights(other)
    assert len(found) == left
    assert len({node.inputs[0] for node in found}) == left  # none is shared


@pytest.mark.parametrize("form", ["loop", "unrolled"])
def test_a_graph_that_needs_nothing_stays(form: str, tmp_path: Path) -> None:
    (folder := tmp_path / "rewritten").mkdir()
    whole = graph("fp32", form, tmp_path)
    assert rewritten(whole, folder) == whole
    assert not list(folder.iterdir())
