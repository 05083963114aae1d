"""What TensorRT-RTX is given instead of a graph that it fails on computes the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mmd_export.checkpoint import load_checkpoint
from mmd_export.onnx_nodes import PRODUCTS
from mmd_export.program import export_program
from mmd_export.targets import CompileOptions, get_target
from mmd_export.trt.rewrite import rewritten


def graph(model: str, precision: str, form: str, folder: Path) -> Path:
    """Two steps."""
    checkpoint = load_checkpoint(model)
    inputs = (checkpoint.denoiser, checkpoint.plan_for(2, sampler="ddim"), checkpoint.shape, 1)
    program = export_program(*inputs, conditions=checkpoint.conditions)
    get_target("onnx").compile(program, folder, CompileOptions(precision, form=form))
    return folder / "model.onnx"


def sample(path: Path) -> np.ndarray:
    """As written: onnxruntime's own fusions would round differently in the two."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    inputs = {"noise": np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32)}
    if len(session.get_inputs()) > 1:
        inputs["class_labels"] = np.array([3], np.int64)
    (found,) = session.run(["sample"], inputs)
    return np.asarray(found)


def dequantised_products(path: Path) -> Counter[tuple[str | None, str | None]]:
    """How many products with dequantised weights read each value, by graph and value."""
    model = ir.load(path)
    found: Counter[tuple[str | None, str | None]] = Counter()
    for node in model.graph.all_nodes():
        weight = node.inputs[1].producer() if node.op_type in PRODUCTS and node.inputs[1] is not None else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            found[
                node.graph.name if node.graph is not None else None, node.inputs[0].name if node.inputs[0] else None
            ] += 1
    return found


@pytest.mark.parametrize(("model", "form"), [("digits", "loop"), ("digits", "unrolled"), ("labels", "loop")])
def test_it_computes_the_same(model: str, form: str, tiny_labels: Path, tmp_path: Path) -> None:
    """The attention of digits has three products of one value, a network that takes labels its time projections."""
    whole = graph(str(tiny_labels) if model == "labels" else model, "w8", form, tmp_path)
    before = whole.read_bytes()
    (folder := tmp_path / "rewritten").mkdir()
    other = rewritten(whole, folder)
    assert whole.read_bytes() == before
    assert other.parent == folder
    np.testing.assert_allclose(sample(other), sample(whole), atol=1e-6)
    assert max(dequantised_products(whole).values()) > 2
    assert max(dequantised_products(other).values()) == (2 if form == "loop" else 3)


@pytest.mark.parametrize("form", ["loop", "unrolled"])
def test_a_graph_that_needs_nothing_stays(form: str, tmp_path: Path) -> None:
    (folder := tmp_path / "rewritten").mkdir()
    whole = graph("digits", "fp32", form, tmp_path)
    assert rewritten(whole, folder) == whole
    assert not list(folder.iterdir())
