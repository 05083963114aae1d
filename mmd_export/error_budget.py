"""Where an error over the steps comes from: made in a step, or inherited and amplified. No torch.

With ``free_k`` the artefact's state from its own chain, ``forced_k`` the one that step k makes of the reference states
before it, and ``exact_k`` the reference,

    free_k - exact_k = (forced_k - exact_k) + (free_k - forced_k)
    error of step k  =  local                +  inherited
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepError:
    """One step; every error as its largest and as its root mean square.

    Args:
        step: k, counted from 1 as in ``state.<k>``.
        atol, rtol: the state may be off by atol + rtol |exact_k|.
        total: free_k - exact_k.
        local: forced_k - exact_k.
        inherited: free_k - forced_k.
        growth: rms of ``total`` over that of the step before; None at the first step and where that was 0.
        gain: rms of ``inherited`` over that of the step before's ``total``: what this step made of the error it got.
        amplification: median over pairs of images of |exact_k(i) - exact_k(j)| / |exact_{k-1}(i) - exact_{k-1}(j)|,
            what the reference sampler itself does to a difference; None with one image.
        total_required: the ``atol`` that ``total`` takes beside ``rtol``.
        local_required: the same of ``local``.
        local_image: the image with the largest ``local``.
        required_image: the image that sets ``local_required``.
    """

    step: int
    atol: float
    rtol: float
    total_max: float
    total_rms: float
    local_max: float
    local_rms: float
    inherited_max: float
    inherited_rms: float
    growth: float | None
    gain: float | None
    amplification: float | None
    total_required: float
    local_required: float
    local_image: int
    required_image: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is not finite is null."""
        return {key: value if value is not None and np.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ErrorBudget:
    """Every step, in order, with the tolerance that its state must keep; ``noises``: golden or fresh ones."""

    steps: tuple[StepError, ...]
    noises: str = "golden"

    @property
    def first_step(self) -> int | None:
        """The first step that breaks the budget by itself, else the first whose state does; None if none does."""
        by_itself = (each.step for each in self.steps if not each.local_required <= each.atol)
        piled_up = (each.step for each in self.steps if not each.total_required <= each.atol)
        return next(by_itself, None) or next(piled_up, None)

    @property
    def by_itself(self) -> bool:
        """Whether that step is wrong by itself; else the error has piled up."""
        return any(not each.local_required <= each.atol for each in self.steps)

    @property
    def largest_local(self) -> int:
        """The step that adds most, of those up to ``first_step``, or of all."""
        return max(self.steps[: self.first_step], key=lambda each: each.local_max).step

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "noises": self.noises, "first_step": self.first_step, "by_itself": self.by_itself,
            "steps": [each.to_dict() for each in self.steps],
        }  # fmt: skip


def error_budget(
    noise: NDArray[Any],
    exact: Sequence[NDArray[Any]],
    free: Sequence[NDArray[Any]],
    forced: Sequence[NDArray[Any]],
    tolerances: Sequence[tuple[float, float]],
    noises: str = "golden",
) -> ErrorBudget:
    """The budget of K steps; ``noise`` and each state are (N, C, H, W), states after step 1 .. K.

    ``tolerances``: (atol, rtol) of each state.
    """
    steps: list[StepError] = []
    before, passed_on = noise, 0.0
    for want, own, taught, (atol, rtol) in zip(exact, free, forced, tolerances, strict=True):
        with np.errstate(invalid="ignore", over="ignore"):
            total, local, inherited = (_difference(a, b) for a, b in ((own, want), (taught, want), (own, taught)))
        size, brought, allowed = _rms(total), _rms(inherited), rtol * np.abs(want.astype(np.float64))
        growth, gain = (size / passed_on, brought / passed_on) if passed_on > 0.0 else (None, None)
        steps.append(
            StepError(
                len(steps) + 1, atol, rtol, _largest(total), size, _largest(local), _rms(local), _largest(inherited),
                brought, growth, gain, amplification(before, want), _required(total, allowed),
                _required(local, allowed), _worst_image(local), _worst_image(local, allowed),
            )
        )  # fmt: skip
        before, passed_on = want, size
    return ErrorBudget(tuple(steps), noises)


def amplification(before: NDArray[Any], after: NDArray[Any]) -> float | None:
    """Median over pairs of images of |after_i - after_j| / |before_i - before_j|; None without two that differ."""
    apart = [_pair_distances(states) for states in (before, after)]
    different = apart[0] > 0.0
    return float(np.median(apart[1][different] / apart[0][different])) if different.any() else None


def _pair_distances(states: NDArray[Any]) -> NDArray[np.float64]:
    """Euclidean, of all pairs i < j of the first 16 images."""
    flat = states[:16].reshape(len(states[:16]), -1).astype(np.float64)
    rows, columns = np.triu_indices(len(flat), k=1)
    distances: NDArray[np.float64] = np.linalg.norm(flat[rows] - flat[columns], axis=1)
    return distances


def _difference(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    return a.astype(np.float64) - b.astype(np.float64)


def _largest(error: NDArray[np.float64]) -> float:
    return float(np.abs(error).max(initial=0.0)) if np.isfinite(error).all() else np.inf


def _required(error: NDArray[np.float64], allowed: NDArray[np.float64]) -> float:
    """The largest of |error| - allowed, not below 0."""
    return float((np.abs(error) - allowed).max(initial=0.0)) if np.isfinite(error).all() else np.inf


def _worst_image(error: NDArray[np.float64], allowed: NDArray[np.float64] | float = 0.0) -> int:
    """The image with the largest |error| - allowed; what is no number is the largest."""
    beyond = np.where(np.isfinite(error), np.abs(error) - allowed, np.inf)
    return int(beyond.reshape(len(error), -1).max(axis=1, initial=-np.inf).argmax())


def _rms(error: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(error**2))) if np.isfinite(error).all() else np.inf
