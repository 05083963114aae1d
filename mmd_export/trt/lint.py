"""What a graph must not hold for these libraries, beyond what no sampler graph may. onnx_ir, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.conditions import Condition
from mmd_export.errors import NotAvailableError

if TYPE_CHECKING:
    import onnx_ir as ir

# The builder of TensorRT-RTX 1.7.1 crashes on Attention of opset 23 (measured); nothing of ours needs more than 22.
NEWEST_OPSET = 22
_CRASHES = {"Attention"}


def require_buildable(path: Path, conditions: Sequence[Condition], title: str) -> int:
    """The number of nodes; raises NotAvailableError that names the first thing which ``title`` would stumble over.

    Random ops and float64, which its parser accepts, are faults of any sampler graph: ``onnx_lint``.
    """
    import onnx_ir as ir

    from mmd_export.onnx_lint import require_clean

    model = ir.load(path)
    require_clean(model, conditions)
    if found := engine_faults(model):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NotAvailableError(f"{title} cannot be given {found[0]}{more}; build the graph again with mmd-export")
    return sum(1 for _ in model.graph.all_nodes())


def engine_faults(model: ir.Model) -> list[str]:
    """Each in a phrase; empty if there is none."""
    opset = model.graph.opset_imports.get("", 0)
    found = [f"opset {opset}, at most {NEWEST_OPSET} is known to build"] if opset > NEWEST_OPSET else []
    nodes = model.graph.all_nodes()
    return found + [f"node {node.name!r} ({node.op_type})" for node in nodes if node.op_type in _CRASHES]
