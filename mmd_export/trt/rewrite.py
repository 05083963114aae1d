"""What a graph is rewritten to for a library that fails on it as it is; the file stays as it was. onnx_ir."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError

if TYPE_CHECKING:
    import onnx_ir as ir


def unshared(path: Path, folder: Path) -> Path:
    """``path`` itself, or a copy in ``folder`` where no two layers but convolutions dequantise the same weight.

    TensorRT-RTX 1.7.1 fails on such graphs (Myelin, vector::_M_range_check): a w8 or w4 sampler of two steps or more.
    Convolutions may share theirs. Delete this once ``test_steps_share_quantised_weights`` passes without it.
    """
    import onnx_ir as ir

    model = ir.load(path)
    read: set[ir.Value] = set()
    copied = False
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or all(use.node.op_type == "Conv" for use in node.outputs[0].uses()):
            continue
        for place, value in enumerate(node.inputs):
            if value is None or value.const_value is None:
                continue
            if value in read:
                node.replace_input_with(place, _copy(model, value, f"{value.name}_of_{node.name}"))
                copied = True
            read.add(value)
    if not copied:
        return path
    whole = folder / path.name
    try:
        ir.save(model, whole, external_data=f"{path.name}_data")
    except OSError as error:
        raise NotAvailableError(
            f"no room for a copy of {path.name} in {folder.parent}: {error.strerror or error}; set TMPDIR"
        ) from error
    return whole


def _copy(model: ir.Model, value: ir.Value, name: str) -> ir.Value:
    """A new initializer of the same numbers."""
    import onnx_ir as ir

    assert value.const_value is not None
    tensor = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
    copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
    model.graph.register_initializer(copy)
    return copy
