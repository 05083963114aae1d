"""Two arrays of the same thing, compared: numbers first, the verdict at a tolerance after. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRESH = "fresh "  # on noises that the golden file does not hold
FORCED = " teacher-forced"


@dataclass(frozen=True)
class Limits:
    """Tolerances from the command line, by output (``sample``, ``state.<k>``); "" stands for every other one.

    As in Polygraphy a value passes where |actual - expected| <= atol + rtol |expected|.
    """

    atol: Mapping[str, float] = field(default_factory=dict)
    rtol: Mapping[str, float] = field(default_factory=dict)

    def atol_of(self, output: str, default: float, *, named_only: bool = False) -> float:
        """The absolute tolerance of an output; ``named_only``: one on another scale, which "" does not mean."""
        return self.atol.get(output, default if named_only else self.atol.get("", default))

    def rtol_of(self, output: str) -> float:
        """The relative tolerance of an output, 0 unless it was given."""
        return self.rtol.get(output, self.rtol.get("", 0.0))


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Comparison:
    """Two arrays of the same thing. ``faults`` are failures whatever the tolerance.

    ``required``: the largest of |actual - expected| - rtol |expected|, the smallest ``atol`` that would have passed;
    None where it is ``max_abs``. ``worst_index``: where that is. ``values``: how many numbers were compared.
    """

    name: str
    max_abs: float
    mean_abs: float
    worst_index: tuple[int, ...] | None = None
    faults: tuple[str, ...] = ()
    required: float | None = None
    rtol: float = 0.0
    values: int = 0

    @property
    def output(self) -> str:
        """What was compared, ``sample`` or ``state.<k>``, without how."""
        return self.name.removeprefix(FRESH).removesuffix(FORCED)

    @property
    def required_atol(self) -> float:
        """The smallest absolute tolerance that would have passed; infinite where none would."""
        if self.faults:
            return np.inf
        return self.max_abs if self.required is None else self.required

    def passes(self, atol: float, mean: float = np.inf) -> bool:
        """Whether nothing is wrong, nothing is further off than ``atol``, nor all of it by ``mean`` on average."""
        return not self.faults and self.required_atol <= atol and self.mean_abs <= mean

    def to_dict(self) -> dict[str, Any]:
        finite = self.max_abs if np.isfinite(self.max_abs) else None
        required = self.required_atol if np.isfinite(self.required_atol) else None
        return {"name": self.name, "max_abs": finite, "mean_abs": self.mean_abs if finite is not None else None} | {
            "worst_index": self.worst_index, "faults": list(self.faults), "required_atol": required,
            "rtol": self.rtol, "values": self.values,
        }  # fmt: skip


def compare(
    name: str, actual: NDArray[Any], expected: NDArray[Any], *, image: bool = True, rtol: float = 0.0
) -> Comparison:
    """Compare ``actual`` (N, ...) with ``expected``; ``image`` also refuses constant images."""
    if actual.shape != expected.shape:
        return Comparison(name, np.inf, np.inf, faults=(f"shape {actual.shape}, expected {expected.shape}",))
    wanted = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is a fault of its own
        error = np.abs(actual.astype(np.float64) - wanted)
    error = np.where(np.isfinite(error), error, np.inf)
    largest = float(error.max(initial=0.0))
    beyond = error - rtol * np.abs(wanted) if rtol > 0.0 and np.isfinite(largest) else error
    required = float(beyond.max(initial=0.0))
    worst = np.unravel_index(int(beyond.argmax()), error.shape) if error.size else None
    index = None if worst is None else tuple(int(i) for i in worst)
    mean = float(error.mean()) if error.size else 0.0
    return Comparison(name, largest, mean, index, _faults(actual, expected, image), required, rtol, int(error.size))


def _faults(actual: NDArray[Any], expected: NDArray[Any], image: bool) -> tuple[str, ...]:
    """What is wrong whatever the tolerance."""
    faults: list[str] = []
    if actual.dtype != expected.dtype and not (actual.dtype.kind == expected.dtype.kind == "f"):
        faults.append(f"dtype {actual.dtype}, expected {expected.dtype}")
    if np.isnan(actual).any():
        faults.append(f"{int(np.isnan(actual).sum())} NaN values")
    if np.isinf(actual).any():
        faults.append(f"{int(np.isinf(actual).sum())} infinite values")
    pixels = tuple(range(1, actual.ndim))
    lowest, highest = (actual.min(axis=pixels), actual.max(axis=pixels)) if actual.size else (np.zeros(0), np.ones(0))
    constant = np.flatnonzero(lowest == highest) if image else np.zeros(0, dtype=int)
    if len(constant):
        faults.append(f"image {int(constant[0])} is constant")
    if not actual.size:
        faults.append("no values")
    return tuple(faults)
