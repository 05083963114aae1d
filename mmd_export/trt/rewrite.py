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
    shared = [value for node in model.graph.all_nodes() for value in _shared_by(node)]
    if not shared:
        return path
    for node, place in shared:
        value = node.inputs[place]
        assert value is not None
        assert value.const_value is not None
        name = f"{value.name}_of_{node.name}"
        tensor = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
        copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
        model.graph.register_initializer(copy)
        node.replace_input_with(place, copy)
    whole = folder / path.name
    try:
        ir.save(model, whole, external_data=f"{path.name}_data")
    except OSError as error:
        raise NotAvailableError(
            f"no room for a copy of {path.name} in {folder.parent}: {error.strerror or error}; set TMPDIR"
        ) from error
    return whole


def _shared_by(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The inputs of a DequantizeLinear that other nodes read too, for all readers but the first."""
    if node.op_type != "DequantizeLinear" or all(use.node.op_type == "Conv" for use in node.outputs[0].uses()):
        return []
    found = []
    for place, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None:
            first = min((use.node for use in value.uses()), key=lambda reader: str(reader.name))
            if first is not node:
                found.append((node, place))
    return found
