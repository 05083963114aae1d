"""The only place tolerances are written, each with the measurements that set it. No torch.

Absolute, on float32 pixels in [-1, 1] and sampler states of unit scale; on uint8 images in levels. A ``Measurement``
cites a number of a result file; a test holds it against that file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmd_export.errors import NotAvailableError
from mmd_export.manifest import Tolerance

# Rungs 1 and 2 compare float64 with float64. DDPM is the worst: diffusers clamps its variance to 1e-20, a plan not.
EXACT = Tolerance(atol=1e-9, reason="float64 against float64; measured at most 4e-10 (DDPM), below 1e-12 for DDIM")


@dataclass(frozen=True)
class Measurement:
    """The largest number under ``path`` of ``benchmarks/results/<file>``, to three digits; ``of`` which images.

    A part of the path is a key, ``*`` for all, or ``key=value`` for the entry of a list that has it.
    """

    file: str
    path: tuple[str, ...]
    value: float
    of: str = ""

    @property
    def told(self) -> str:
        """``5.91e-03 for 99 % of the images``."""
        return f"{self.value:.2e}" + (f" for {self.of}" if self.of else "")


@dataclass(frozen=True)
class Basis:
    """A tolerance, what makes the error that it allows, and where that was measured."""

    atol: float
    because: str
    measured: tuple[Measurement, ...] = ()

    @property
    def tolerance(self) -> Tolerance:
        """As it goes into a manifest."""
        found = [f"{each.told} ({each.file} {'/'.join(each.path)})" for each in self.measured]
        measured = f"; measured at most {', '.join(found)}" if found else ""
        return Tolerance(atol=self.atol, reason=self.because + measured)


def _precision(name: str, value: float) -> Measurement:
    return Measurement("precision.json", ("precisions", name, "errors", "*", "max"), value)


def _coreml(model: str, precision: str, value: float) -> Measurement:
    return Measurement("coreml.json", ("packages", f"model={model}", f"precision={precision}", "worst"), value)


def _openvino(model: str, artefact: str, value: float) -> Measurement:
    return Measurement("openvino.json", ("models", model, "artefacts", artefact, "worst_error"), value)


def _tail(bundles: str, value: float) -> Measurement:
    return Measurement("honest_tails.json", ("worst_honest", bundles), value)


def _of_ends(target: str, precision: str, run: str, value: float, most: bool = False) -> Measurement:
    """Of hundreds of images of digits, with both ends of the network in float32; ``most``: but for a hundredth."""
    shipped = ("model=digits", "trial=both ends, as shipped", "p99" if most else "worst")
    row = ("rows", f"target={target}", f"precision={precision}", f"run={run}", *shipped)
    return Measurement("half_ends.json", row, value, "99 % of the images" if most else "")


def _targets(target: str, error: str, digits: float, cifar10: float) -> tuple[Measurement, ...]:
    """Of digits and the ddpm-cifar10 architecture in targets.json, which rounds up to one digit."""
    cells = (("digits", digits), (_CIFAR10, cifar10))
    return tuple(
        Measurement("targets.json", ("cells", f"{model} | {target} | fp32", error), value) for model, value in cells
    )


_CIFAR10 = "ddpm-cifar10 architecture"
_ROUNDING = "float32 rounding through the chain"
_TAIL = "of hundreds of images the one whose chain spreads most"

# Compiled from the graph of target onnx, TF32 off, by libraries that no GPU was at hand to run.
_FROM_THE_GRAPH = ("tensorrt", "tensorrt-rtx")
_IN_AN_ENGINE = Basis(
    1e-2,
    "float16, norms, softmax and both ends of the network float32; every result rounded, not yet on a GPU",
    (_of_ends("onnx", "fp16", "every result rounded", 5.91e-03, most=True),),
)

BASES: Mapping[tuple[str, str], Basis] = {
    ("onnx", "fp32"): Basis(
        1e-4,
        _ROUNDING,
        (
            Measurement("artefacts.json", ("models", "digits", "worst_artefact_error"), 1.91e-06),
            Measurement("artefacts.json", ("models", _CIFAR10, "worst_artefact_error"), 2.10e-05),
        ),
    ),
    ("onnx", "fp16"): Basis(
        1e-2,
        f"float16, norms, softmax and both ends of the network float32; {_TAIL}",
        (_precision("fp16", 2.10e-03), _tail("onnx fp16", 3.73e-03), _of_ends("onnx", "fp16", "onnxruntime", 5.39e-03)),
    ),
    ("onnx", "bf16"): Basis(
        0.3,
        f"bfloat16, norms, softmax and both ends of the network float32; every result rounded; {_TAIL}",
        (_precision("bf16", 9.76e-03), _of_ends("onnx", "bf16", "every result rounded", 1.15e-01)),
    ),
    ("onnx", "int8"): Basis(
        0.6,
        f"8-bit weights and activations; {_TAIL}",
        (_precision("int8", 4.44e-02), _tail("onnx int8", 3.62e-01)),
    ),
    ("onnx", "fp8"): Basis(
        1.0,
        f"E4M3, 4 bits of each weight and activation; {_TAIL}",
        (_precision("fp8", 1.53e-01), _tail("onnx fp8", 7.42e-01)),
    ),
    ("onnx", "w8"): Basis(0.15, f"8-bit weights; {_TAIL}", (_precision("w8", 1.89e-02), _tail("onnx w8", 7.81e-02))),
    ("onnx", "w4"): Basis(1.6, f"4-bit weights; {_TAIL}", (_precision("w4", 2.24e-01), _tail("onnx w4", 1.24e00))),
    ("openvino", "fp32"): Basis(
        1e-4, _ROUNDING, (_openvino("digits", "openvino", 3.70e-06), _openvino(_CIFAR10, "openvino", 2.62e-06))
    ),
    ("openvino", "w16"): Basis(
        1e-2,
        "weights rounded to float16, relative 5e-4",
        (_openvino("digits", "openvino w16", 1.13e-03), _openvino(_CIFAR10, "openvino w16", 1.27e-03)),
    ),
    ("coreml", "fp32"): Basis(
        1e-4, _ROUNDING, (_coreml("digits", "fp32", 1.82e-06), _coreml(_CIFAR10, "fp32", 1.10e-06))
    ),
    ("coreml", "fp16"): Basis(
        1e-2,
        f"half precision in the network, its ends and the state in float32; {_TAIL}",
        (
            _coreml("digits", "fp16", 2.77e-03),
            _coreml(_CIFAR10, "fp16", 2.08e-03),
            _tail("coreml fp16", 3.62e-03),
            _of_ends("coreml", "fp16", "reference evaluation", 3.71e-03),
        ),
    ),
    ("coreml", "w8"): Basis(
        0.08, "int8 weights, a scale a channel", (_coreml("digits", "w8", 2.10e-02), _coreml(_CIFAR10, "w8", 2.07e-02))
    ),
    ("coreml", "w6"): Basis(
        0.4, f"palettes of 64 values; {_TAIL}", (_coreml("digits", "w6", 7.89e-02), _tail("coreml w6", 2.42e-01))
    ),
    ("coreml", "w4"): Basis(
        1.2, f"palettes of 16 values; {_TAIL}", (_coreml("digits", "w4", 2.47e-01), _tail("coreml w4", 5.15e-01))
    ),
    **{(target, "fp16"): _IN_AN_ENGINE for target in _FROM_THE_GRAPH},
    ("torch", "fp32"): Basis(1e-4, f"{_ROUNDING}; the sample alone", _targets("torch", "sample_error", 9e-07, 3e-06)),
    ("coreai", "fp32"): Basis(1e-4, _ROUNDING, _targets("coreai", "worst_state_error", 2e-06, 2e-06)),
    ("executorch", "fp32"): Basis(1e-4, _ROUNDING, _targets("executorch", "worst_state_error", 6e-06, 4e-06)),
}


# What the worst of hundreds of images may reach where every result is rounded; ONNX Runtime on a CPU rounds fewer.
ON_A_DEVICE = Basis(
    0.03,
    f"float16, every result rounded; {_TAIL}",
    (_of_ends("onnx", "fp16", "every result rounded", 1.23e-02),),
)


def on_a_device(target: str, precision: str) -> Basis | None:
    """What to allow where an artefact in fp16 breaks its tolerance on a device, or None."""
    return ON_A_DEVICE if precision == "fp16" and target in ("onnx", *_FROM_THE_GRAPH) else None


# Of float32, by the largest factor with which the plan multiplies an output (``StepPlan.output_gain``).
BY_GAIN = Basis(
    2.5e-5,
    "float32 rounding of an output, by the factor with which the plan multiplies it",
    (Measurement("steep_plans.json", ("rows", "error_by_gain"), 1.99e-05),),
)


def artefact_tolerance(target: str, precision: str, gain: float = 1.0) -> Tolerance:
    """How far an artefact may be from the float64 reference at any step; ``gain``: ``output_gain`` of its plan."""
    if precision == "fp32":
        return _steep(_artefact_tolerance(target, precision), gain)
    return _artefact_tolerance(target, precision)


def _steep(tolerance: Tolerance, gain: float) -> Tolerance:
    """``tolerance``, or what rounding alone makes of a plan that multiplies outputs by ``gain``."""
    if gain * BY_GAIN.atol <= tolerance.atol:
        return tolerance
    atol = float(f"{gain * BY_GAIN.atol:.2g}")
    return Tolerance(atol=atol, reason=f"{BY_GAIN.tolerance.reason}; here {gain:.0f}")


def _artefact_tolerance(target: str, precision: str) -> Tolerance:
    if target in _FROM_THE_GRAPH and (target, precision) not in BASES:
        graph = _artefact_tolerance("onnx", precision)
        return graph.model_copy(update={"reason": f"{graph.reason}; the graph in ONNX Runtime, not yet on a GPU"})
    try:
        return BASES[target, precision].tolerance
    except KeyError:
        known = ", ".join(f"{t} {p}" for t, p in BASES)
        raise NotAvailableError(f"no measured tolerance for {target} {precision}; measured: {known}") from None


def torch_tolerance(gain: float = 1.0) -> Tolerance:
    """Rungs 3 to 5, inside torch: float64 -> float32 -> specialised -> exported; ``gain`` as above."""
    return artefact_tolerance("onnx", "fp32", gain)


def mean_tolerance(atol: float) -> float:
    """What all of a comparison may be off on average, within ``atol`` for any value of it.

    The worst pixel of hundreds of images takes a wide tolerance, which alone would let another picture pass. Of honest
    artefacts the mean is far lower: ``worst_mean_honest`` in honest_tails.json, by target and precision.
    """
    return atol / 8.0


def uint8_tolerance(atol: float) -> tuple[float, float]:
    """For uint8 samples of an artefact within ``atol``: levels that a value may be off, and that all are on average.

    A level is 2 / 255 of the range [-1, 1]. A value near x.5 may round either way, but rounding has no side: on average
    an error stays what it was, so the limit of float32 holds. It is no less than 0.25 where ``atol`` is a quarter of a
    level or more, far above honest noise; a truncation shows as half a level.
    """
    levels = 127.5 * atol
    return max(1.0, math.ceil(levels)), max(127.5 * mean_tolerance(atol), min(levels, 0.25))
