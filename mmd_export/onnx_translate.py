"""One captured network call as an ONNX model: torch.onnx, then what an optimiser may do without changing a number."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes

from mmd_export.errors import NotAvailableError, one_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20  # the newest that TensorRT 10, onnxruntime and the web runtimes all read
# The rules that merge or drop moves of data and casts, and padding in front of a convolution. Not slice_split_rule: for
# its two outputs onnxscript 0.7.2 lists the whole graph at every node (rewriter/_matcher.py). Add it once this is gone.
_RULES = (
    "cast_cast_rule", "collapse_slice_rule", "collapse_slice2_rule", "flatten_to_reshape_rule", "no_op_cast_rule",
    "no_op_expand_rule", "no_op_transpose_rule", "normalize_pad_format_conv_rule", "fuse_pad_into_conv_rule",
    "reshape_reshape_rule", "squeeze_reshape_1d_rule", "transpose_transpose_rule", "unsqueeze_unsqueeze_rule",
    "materialize_reshape_shape_rule",
)  # fmt: skip
_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


def translate(program: ExportedProgram) -> ir.Model:
    """``program`` with its inputs and one output, constants folded and as initialisers.

    onnxscript's own ``optimize`` is not called: its x + 0 -> x takes everything below 1e-8 for 0, such as the epsilon
    of a linear attention, x / (y + 1e-15), which is then 0 / 0 (onnxscript/rewriter/_pattern_ir.py, abs_tol, 0.7.2);
    and matching all of its rules costs as much as the translation. Call it once that tolerance is gone.

    Raises NotAvailableError that names the first operator which torch.onnx does not translate.
    """
    import torch
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    with quiet_export():
        try:
            exported = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False, external_data=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise NotAvailableError(
                f"torch.onnx cannot translate it: {_innermost(error)}; write it with operators that ONNX has"
            ) from error
    assert exported is not None
    fold_constants(exported.model, onnx_shape_inference=True)
    model: ir.Model = rewrite(exported.model, [getattr(rules, name) for name in _RULES])
    tidy(model)
    drop_neutral(model)
    tidy(model)
    return model


def _innermost(error: BaseException) -> str:
    """The reason: the first in a chain of errors, whose outer ones are pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.onnx warns of a missing torchvision and of deprecations inside torch; neither is the user's to act on."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def tidy(model: ir.Model) -> None:
    """What need not be done again for every copy of the call."""
    Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.DeduplicateInitializersPass(),  # before what compares nodes by their inputs
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)


def drop_neutral(model: ir.Model) -> None:
    """x * 1, x / 1, x + 0 and x - 0 become x, where the number is exactly that and of no larger shape."""
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        if node.op_type in _NEUTRAL and node.outputs[0] not in outputs and _is_neutral(node):
            assert node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def _is_neutral(node: ir.Node) -> bool:
    """Whether the second operand is one number that changes nothing; float32 keeps its type."""
    number = node.inputs[1] if len(node.inputs) == 2 else None
    tensor = None if number is None else number.const_value
    if tensor is None or tensor.shape.rank() != 0 or tensor.dtype != ir.DataType.FLOAT:
        return False
    return bool(tensor.numpy() == np.float32(_NEUTRAL[node.op_type]))
