"""Target ``tensorrt-rtx``: engines for NVIDIA RTX GPUs, built without one for the compute capabilities asked for."""

from __future__ import annotations

from mmd_export.targets.tensorrt import EngineTarget
from mmd_export.trt.library import RTX

TARGET = EngineTarget(RTX)
