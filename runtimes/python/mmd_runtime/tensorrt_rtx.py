"""Engines of TensorRT-RTX."""

from __future__ import annotations

from mmd_export.trt.library import RTX
from mmd_runtime.engines import EngineRuntime

RUNTIME = EngineRuntime(RTX)
