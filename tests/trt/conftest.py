"""ONNX files to compile, made once; a skip where TensorRT-RTX is not installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mmd_export.trt.library import RTX
from tests.cli.conftest import command
from tests.models import tiny, tiny_attention, tiny_checkpoint, tiny_labels

__all__ = ["command", "tiny", "tiny_attention", "tiny_checkpoint", "tiny_labels"]

OneNode = Callable[..., Path]


@pytest.fixture(scope="session")
def _rtx() -> None:
    found = RTX.installed()
    if not found.available:
        pytest.skip(f"{found.detail}; {found.install}")


@pytest.fixture
def one_node(tmp_path: Path) -> OneNode:
    """Write a graph of one node and return its path."""

    def write(op: str, shape: Sequence[int], opset: int = 20, inputs: int = 1) -> Path:
        noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, list(shape))
        sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, None)
        node = helper.make_node(op, ["noise"] * inputs, ["sample"], name="the_node")
        graph = helper.make_graph([node], "graph", [noise], [sample])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        path = tmp_path / f"{op}.onnx"
        onnx.save(model, path)
        return path

    return write
