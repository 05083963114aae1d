"""coremltools' pass to half precision, with a check of the weights that costs neither memory nor time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

PASS, REPLACED = "mmd_export::to_half", "common::add_fp16_cast"
LARGEST_HALF = 65504.0


def register() -> None:
    """Make ``PASS`` known to coremltools; in all else it is ``REPLACED``. Option ``op_selector``.

    coremltools 9.0 asks of every use of a weight whether half precision holds it, through an index of all its values:
    five times the weight's memory, and a third of the pass (mil/passes/defs/quantization.py, fp16_overflow). Delete
    once it looks for the largest value first.
    """
    passes = importlib.import_module("coremltools.converters.mil.mil.passes.pass_registry")
    quantization = importlib.import_module("coremltools.converters.mil.mil.passes.defs.quantization")
    original: Any = quantization.FP16ComputePrecision

    def overflows(op: Any) -> bool:
        return not all(_fits(value) for value in _constants(op)) and original.fp16_overflow(op)

    half = type("to_half", (original,), {"fp16_overflow": staticmethod(overflows)})
    passes.register_pass(namespace="mmd_export", override=True)(half)


class Float32:
    """The operations that stay float32: those of ``names``, and all that depend on the value ``last``.

    coremltools 9.0 gives the name of a node of torch to its operation, but to the result alone of a linear layer
    (converters/mil/frontend/torch/ops.py, linear); it puts ``_inversed_`` before it where a division becomes a product
    (mil/passes/defs/optimize_elementwise_binary.py), and passes that merge operations name the new one themselves. So
    names are looked for in all these places, and a decoder is told by what it reads. Delete once names are kept.
    """

    def __init__(self, names: frozenset[str], last: str) -> None:
        self.names, self.last = names, last
        self._behind: frozenset[str] | None = None  # of the operations before the first is changed

    def __contains__(self, op: Any) -> bool:
        if self._behind is None:
            self._behind = _behind(op.enclosing_block.operations, self.last)
        named = {op.name, *(var.name for var in op.outputs)}
        return op.name in self._behind or any(name.removeprefix("_inversed_") in self.names for name in named)


def _behind(operations: Any, last: str) -> frozenset[str]:
    """The names of the operations that depend on the value ``last``."""
    values, found = {last}, set()
    for op in operations:
        if any(var.name in values for var in op.get_flattened_inputs()):
            found.add(op.name)
            values |= {var.name for var in op.outputs}
    return frozenset(found)


def _constants(op: Any) -> list[Any]:
    """The float32 constants among the inputs of ``op``."""
    flat = op.get_flattened_inputs()
    used = [var for var in flat if var.op is not None and var.op.op_type == "const"]
    return [np.asarray(var.op.val.val) for var in used if var.is_tensor_or_scalar_of(dtype="fp32")]


def _fits(value: Any) -> bool:
    """Whether all of ``value`` lies within half precision; infinities and NaN do not."""
    return bool(value.min() >= -LARGEST_HALF and value.max() <= LARGEST_HALF) if value.size else True
