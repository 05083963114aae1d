"""What a graph must not hold for these libraries; that it is a static sampler graph is checked where it is made.

onnx_ir, no torch.
"""

from __future__ import annotations

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
    for node in model.graph.all_nodes():
        if node.op_type in _CRASHES | RANDOM:
            found.append(f"node {node.name!r} ({node.op_type})")
        found += [f"float64 value {value.name!r}" for value in node.outputs if _is_float64(value)]
    return found


def _is_float64(value: ir.Value) -> bool:
    """Its parser takes float64 too, which no tolerance of ours is about."""
    return value.dtype is not None and value.dtype.name == "DOUBLE"
