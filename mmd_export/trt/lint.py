"""What a graph must not hold for these libraries; that it is a static sampler graph is checked where it is made.

onnx_ir, no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import BundleError, NotAvailableError, one_line

if TYPE_CHECKING:
    import onnx_ir as ir

NEWEST_OPSET = 22  # the newest that ours have
# The builder of TensorRT-RTX 1.7.1 crashes on this op of opset 23 (tests/trt/test_process.py).
_CRASHES = {"Attention"}


def require_buildable(path: Path, title: str) -> int:
    """The number of nodes; raises NotAvailableError that names the first thing which ``title`` should not be given.

    And BundleError for a damaged file.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        model = ir.load(path)
    except DecodeError as error:
        raise BundleError(f"{path.name} is no ONNX graph ({one_line(error)}); build the bundle again") from error
    if found := engine_faults(model):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NotAvailableError(f"{title} cannot be given {found[0]}{more}; build the graph again with mmd-export")
    return sum(1 for _ in model.graph.all_nodes())


def engine_faults(model: ir.Model) -> list[str]:
    """Each in a phrase; empty if there is none."""
    from mmd_export.onnx_lint import RANDOM  # which loads onnx_ir

    opset = model.graph.opset_imports.get("", 0)
    found = [f"opset {opset}, at most {NEWEST_OPSET} is known to build"] if opset > NEWEST_OPSET else []
    edge = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        if node.op_type in _CRASHES | RANDOM:
            found.append(f"node {node.name!r} ({node.op_type})")
        found += [f"{name} value {value.name!r}" for value in node.outputs if (name := _unwanted(value, edge))]
    return found


def _unwanted(value: ir.Value, edge: Collection[ir.Value]) -> str:
    """The type if a value should not have it, "" if it may.

    Their parsers take float64 too, which no tolerance of ours is about. They do not take uint8 inside a network, only
    as its input or output: "TensorRT does not support UINT8 types for intermediate tensors".
    """
    kind = "" if value.dtype is None else value.dtype.name
    if kind == "UINT8":
        return "" if value in edge else "inner uint8"
    return "float64" if kind == "DOUBLE" else ""
