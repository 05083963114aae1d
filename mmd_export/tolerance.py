"""The only place tolerances are written, each with the measurement that set it. No torch.

Absolute, on float32 pixels in [-1, 1] and sampler states of unit scale; on uint8 images one level.
"""

from __future__ import annotations

from mmd_export.errors import NotAvailableError
from mmd_export.manifest import Tolerance

# Rungs 1 and 2 compare float64 with float64. DDPM is the worst: diffusers clamps its variance to 1e-20, a plan not.
EXACT = Tolerance(atol=1e-9, reason="float64 against float64; measured at most 4e-10 (DDPM), below 1e-12 for DDIM")

_ARTEFACT = {
    ("onnx", "fp32"): Tolerance(
        atol=1e-4,
        reason="float32 rounding through the chain; measured at most 4e-6 on digits and 2e-5 on the ddpm-cifar10 "
        "architecture, 5 steps, every state (benchmarks/results/artefacts.json)",
    ),
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


def artefact_tolerance(target: str, precision: str) -> Tolerance:
    """How far an artefact may be from the float64 reference at any step."""
    try:
        return _ARTEFACT[target, precision]
    except KeyError:
        known = ", ".join(f"{t} {p}" for t, p in _ARTEFACT)
        raise NotAvailableError(f"no measured tolerance for {target} {precision}; measured: {known}") from None


def torch_tolerance() -> Tolerance:
    """Rungs 3 to 5, inside torch: float64 -> float32 -> specialised -> exported."""
    return _ARTEFACT["onnx", "fp32"]


UINT8_LEVELS = 1.0  # a value within the float tolerance of x.5 may round either way
