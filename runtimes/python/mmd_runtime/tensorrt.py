"""Engines of TensorRT 10 and 11."""

from __future__ import annotations

from mmd_export.trt.library import TENSORRT
from mmd_runtime.engines import EngineRuntime

RUNTIME = EngineRuntime(TENSORRT)
