"""The only place tolerances are written, each with the measurement that set it. No torch.

Absolute, on float32 pixels in [-1, 1] and sampler states of unit scale; on uint8 images one level.
"""

from __future__ import annotations

import math

from mmd_export.errors import NotAvailableError
from mmd_export.manifest import Tolerance

# Rungs 1 and 2 compare float64 with float64. DDPM is the worst: diffusers clamps its variance to 1e-20, a plan not.
EXACT = Tolerance(atol=1e-9, reason="float64 against float64; measured at most 4e-10 (DDPM), below 1e-12 for DDIM")


def _of_digits(atol: float, reason: str) -> Tolerance:
    return Tolerance(
        atol=atol,
        reason=f"{reason} on digits, untuned and tuned, 5 steps, every state (benchmarks/results/precision.json)",
    )


_ARTEFACT = {
    ("onnx", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 4e-6 on digits and 2e-5 on the ddpm-cifar10 "
        "architecture, 5 steps, every state (benchmarks/results/artefacts.json)",
    ),
    ("openvino", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 5e-6 on digits and 3e-6 on the ddpm-cifar10 "
        "architecture, 5 steps, every state (benchmarks/openvino.py)",
    ),
    ("openvino", "w16"): Tolerance(
        atol=1e-2,
        reason="weights rounded to float16, relative 5e-4; measured at most 2e-3 on digits and on the ddpm-cifar10 "
        "architecture, 5 steps, every state (benchmarks/openvino.py)",
    ),
    ("onnx", "fp16"): _of_digits(0.03, "float16, norms and softmax float32; measured at most 1e-2"),
    ("onnx", "bf16"): _of_digits(0.3, "bfloat16, 8 bits of each number, emulated; measured at most 8e-2"),
    ("onnx", "int8"): _of_digits(0.25, "8-bit weights and activations; measured at most 0.12"),
    ("onnx", "fp8"): _of_digits(0.6, "E4M3, 4 bits of each weight and activation; measured at most 0.15"),
    ("onnx", "w8"): _of_digits(0.1, "8-bit weights; measured at most 4e-2"),
    ("onnx", "w4"): _of_digits(0.95, "4-bit weights; measured at most 0.42"),
    # Reference evaluation of digits and the ddpm-cifar10 architecture, 5 steps, every state: results/coreml.json
    ("coreml", "fp32"): Tolerance(atol=1e-4, reason="float32 rounding; measured at most 3e-6"),
    ("coreml", "fp16"): Tolerance(
        atol=1e-2, reason="half precision in the network, state in float32; measured at most 7e-3"
    ),
    ("coreml", "w8"): Tolerance(atol=0.08, reason="int8 weights, a scale a channel; measured at most 0.03 on digits"),
    ("coreml", "w6"): Tolerance(atol=0.25, reason="palettes of 64 values; measured at most 0.08 on digits"),
    ("coreml", "w4"): Tolerance(atol=0.6, reason="palettes of 16 values; measured at most 0.25 on digits"),
    ("torch", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 2e-6 on digits, 5 steps, the sample",
    ),
    ("coreai", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 2e-6 on digits, 5 steps, every state",
    ),
    ("executorch", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 6e-6 on digits, 5 steps, every state",
    ),
}


# Compiled from the graph of target onnx, TF32 off, by libraries that no GPU was at hand to run.
_FROM_THE_GRAPH = ("tensorrt", "tensorrt-rtx")


def artefact_tolerance(target: str, precision: str) -> Tolerance:
    """How far an artefact may be from the float64 reference at any step."""
    if target in _FROM_THE_GRAPH:
        graph = artefact_tolerance("onnx", precision)
        return graph.model_copy(update={"reason": f"{graph.reason}; the graph in ONNX Runtime, not yet on a GPU"})
    try:
        return _ARTEFACT[target, precision]
    except KeyError:
        known = ", ".join(f"{t} {p}" for t, p in _ARTEFACT)
        raise NotAvailableError(f"no measured tolerance for {target} {precision}; measured: {known}") from None


def torch_tolerance() -> Tolerance:
    """Rungs 3 to 5, inside torch: float64 -> float32 -> specialised -> exported."""
    return _ARTEFACT["onnx", "fp32"]


def uint8_tolerance(atol: float) -> tuple[float, float]:
    """For uint8 samples of an artefact within ``atol``: levels that a value may be off, and that all are on average.

    A level is 2 / 255 of the range [-1, 1]. A value near x.5 may round either way, but rounding has no side: on average
    an error stays what it was, where a truncation would show as half a level.
    """
    levels = 127.5 * atol
    return max(1.0, math.ceil(levels)), levels
