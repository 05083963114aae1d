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


def _constants(op: Any) -> list[Any]:
    """The float32 constants among the inputs of ``op``."""
    flat = op.get_flattened_inputs()
    used = [var for var in flat if var.op is not None and var.op.op_type == "const"]
    return [np.asarray(var.op.val.val) for var in used if var.is_tensor_or_scalar_of(dtype="fp32")]


def _fits(value: Any) -> bool:
    """Whether all of ``value`` lies within half precision; infinities and NaN do not."""
    return bool(value.min() >= -LARGEST_HALF and value.max() <= LARGEST_HALF) if value.size else True
