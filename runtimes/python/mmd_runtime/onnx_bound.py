"""A run of onnxruntime with its inputs and outputs on the device, by IO binding: nothing is allocated or copied."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mmd_export.bundle import Bundle, TensorSpec
from mmd_export.errors import MmdExportError, one_line
from mmd_export.runtime import Array, Arrays
from mmd_runtime.onnx_providers import failures


class BoundRun:
    """``session`` with the arrays of ``inputs``, ``count`` images, on ``device``; its outputs stay there too."""

    def __init__(self, bundle: Bundle, session: Any, device: str, inputs: Arrays, count: int) -> None:
        values = importlib.import_module("onnxruntime").OrtValue
        self._bundle, self._session, self._binding = bundle, session, session.io_binding()
        self._inputs = {
            name: values.ortvalue_from_numpy(np.array(array, order="C"), device, 0) for name, array in inputs.items()
        }
        self._outputs = {
            spec.name: values.ortvalue_from_shape_and_type(_shape(spec, count), np.dtype(spec.dtype), device, 0)
            for spec in bundle.manifest.outputs
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def update(self, inputs: Arrays) -> None:
        """Copy other arrays of the same shapes to where the first were."""
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except failures() as error:
            name = self._bundle.name
            raise MmdExportError(f"bundle {name}: onnxruntime failed while running it: {one_line(error)}") from error

    def outputs(self) -> dict[str, Array]:
        """What the last run gave, copied."""
        return {name: value.numpy().copy() for name, value in self._outputs.items()}


def _shape(spec: TensorSpec, count: int) -> list[int]:
    """With ``count`` for the batch."""
    return [count if size == "batch" else int(size) for size in spec.shape]
