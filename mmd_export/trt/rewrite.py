"""What a graph is rewritten to for a library that fails on it as it is; the file stays as it was. onnx_ir."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError

if TYPE_CHECKING:
    import onnx_ir as ir


def rewritten(path: Path, folder: Path) -> Path:
    """``path`` itself, or a copy in ``folder`` that computes the same and that TensorRT-RTX 1.7.1 compiles.

    Each rewrite can go once the test that it names passes without it.
    """
    import onnx_ir as ir

    model = ir.load(path)
    if not _unshare(model) | _dequantise_third_product(model):
        return path
    whole = folder / path.name
    try:
        ir.save(model, whole, external_data=f"{path.name}_data")
    except OSError as error:
        raise NotAvailableError(
            f"no room for a copy of {path.name} in {folder.parent}: {error.strerror or error}; set TMPDIR"
        ) from error
    return whole


def _unshare(model: ir.Model) -> bool:
    """No two layers but convolutions dequantise the same weight; whether anything changed.

    The library fails on such graphs (Myelin, vector::_M_range_check): a w8 or w4 sampler of two steps or more.
    Convolutions may share theirs. tests/trt/test_deferred.py::test_steps_share_quantised_weights
    """
    read: set[ir.Value] = set()
    changed = False
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or all(use.node.op_type == "Conv" for use in node.outputs[0].uses()):
            continue
        for place, value in enumerate(node.inputs):
            if value is None or value.const_value is None:
                continue
            if value in read:
                node.replace_input_with(place, _copy(model, value, f"{value.name}_of_{node.name}"))
                changed = True
            read.add(value)
    return changed


def _dequantise_third_product(model: ir.Model) -> bool:
    """In the body of a loop, at most two products of one value have weights with a scale a channel; whether it changed.

    The library fuses three or more (query, key and value of an attention, the time projections of residual blocks) and
    fails (Myelin, ``op->parent() == this``): a w8 sampler in the form ``loop``. The weights from the third on are
    dequantised here.
    tests/trt/test_deferred.py::test_a_loop_has_products_of_quantised_weights
    """
    from mmd_export.onnx_nodes import PRODUCTS

    seen: Counter[ir.Value] = Counter()
    changed = False
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[1].producer() if node.op_type in PRODUCTS and node.inputs[1] is not None else None
        if node.graph is model.graph or weight is None or not _per_channel(weight) or node.inputs[0] is None:
            continue
        seen[node.inputs[0]] += 1
        if seen[node.inputs[0]] > 2:
            node.replace_input_with(1, _dequantised(model, weight))
            changed = True
    return changed


def _per_channel(node: ir.Node) -> bool:
    """Whether ``node`` dequantises a constant, symmetric, a scale a channel rather than a block."""
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    whole = node.op_type == "DequantizeLinear" and len(constants) == len(node.inputs) == 2
    return whole and constants[1].shape.rank() == 1 and "block_size" not in node.attributes


def _dequantised(model: ir.Model, node: ir.Node) -> ir.Value:
    """The constant that ``node`` computes, ``q * scale`` in the type of the scale."""
    import numpy as np

    from mmd_export.onnx_nodes import array_of, constant

    quantised, scale = array_of(node.inputs[0]), array_of(node.inputs[1])
    assert quantised is not None
    assert scale is not None
    along = np.arange(quantised.ndim) == node.attributes.get_int("axis", 1) % quantised.ndim
    product = quantised.astype(np.float32) * scale.astype(np.float32).reshape(np.where(along, -1, 1))
    return constant(model.graph, f"{node.name}/constant", product.astype(scale.dtype))


def _copy(model: ir.Model, value: ir.Value, name: str) -> ir.Value:
    """A new initializer of the same numbers."""
    import onnx_ir as ir

    assert value.const_value is not None
    tensor = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
    copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
    model.graph.register_initializer(copy)
    return copy
