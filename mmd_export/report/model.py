"""What the page says, as plain values: the template and the charts decide nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export import numbers
from mmd_export.bundle import Bundle
from mmd_export.pictures import as_uint8

_STATE = re.compile(r"state\.(\d+)( teacher-forced)?")
SHOWN_IMAGES = 8


@dataclass(frozen=True)
class BundleFacts:
    """One bundle: what was verified, as JSON of ``verify``, and what it drew from the golden noise.

    ``sample``: of the artefact, None where it was not run, and then ``not_drawn`` says why.
    """

    bundle: Bundle
    verify: Mapping[str, Any]
    sample: NDArray[Any] | None = None
    not_drawn: str = ""

    @property
    def verdict(self) -> str:
        """Passed, failed or not verified."""
        if not self.verify:
            return "not verified"
        return "passed" if self.verify.get("passed") else "failed"

    @property
    def rung6(self) -> Mapping[str, Any]:
        """The artefact's rung, empty if there is none."""
        return next((rung for rung in self.verify.get("rungs", ()) if rung.get("rung") == 6), {})


@dataclass(frozen=True)
class Curve:
    """Largest error after every step, by how it was measured; ``atol`` is the tolerance of a state."""

    steps: Mapping[str, tuple[tuple[int, float], ...]]
    atol: float | None


def parity_curve(facts: BundleFacts) -> Curve:
    """Free-running and teacher-forced errors of rung 6. Those that are not finite cannot be drawn and are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for comparison in facts.rung6.get("comparisons", ()):
        match, error = _STATE.fullmatch(str(comparison.get("name"))), comparison.get("max_abs")
        if match is not None and error is not None:
            kind = "teacher-forced" if match[2] else "free-running"
            found.setdefault(kind, []).append((int(match[1]), float(error)))
    return Curve({kind: tuple(sorted(points)) for kind, points in found.items()}, facts.rung6.get("atol"))


@dataclass(frozen=True)
class Pictures:
    """uint8 (N, H, W, C) of artefact and reference, and |artefact - reference| (N, H, W), in units of their range.

    ``largest``: of all differences, what the brightest colour of the map stands for.
    """

    artefact: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    difference: NDArray[np.float64]
    largest: float


def pictures_of(facts: BundleFacts) -> Pictures | None:
    """The first golden images; None where the artefact was not run or gives latents."""
    if facts.sample is None or facts.bundle.gives_latents:
        return None
    artefact, reference = facts.sample[:SHOWN_IMAGES], facts.bundle.golden().sample[:SHOWN_IMAGES]
    channels, span = (3, 255.0) if reference.dtype == np.uint8 else (1, 2.0)
    exact = artefact.astype(np.float64) - reference.astype(np.float64)
    difference = np.abs(np.nan_to_num(exact, nan=span, posinf=span, neginf=-span)).max(axis=channels) / span
    drawn = np.nan_to_num(artefact) if artefact.dtype != np.uint8 else artefact
    return Pictures(as_uint8(drawn), as_uint8(reference), difference, float(difference.max(initial=0.0)))


TARGET_HEADS = ("bundle", "target", "precision", "batch", "artefact", "parity", "worst error", "tolerance", "p50 ms")


def target_rows(all_facts: Sequence[BundleFacts], bench: Mapping[str, Any]) -> list[numbers.Row]:
    """One row a bundle."""
    rows: list[numbers.Row] = []
    for facts in all_facts:
        manifest, worst = facts.bundle.manifest, facts.rung6.get("worst")
        kind = (manifest.name, manifest.target, manifest.precision, str(manifest.batch))
        size = f"{facts.bundle.artefact_bytes / 1e6:.2f} MB"
        summary = bench.get("summary", {}).get(numbers.measured_as(facts.bundle.artefact_sha256, bench), {})
        error = "-" if worst is None else f"{worst:.1e}"
        atol = f"{manifest.tolerance.atol:g}"
        rows.append((*kind, size, facts.verdict, error, atol, numbers.in_ms(summary.get("p50"))))
    return rows


DISTRIBUTION_HEADS = ("noise", "features", "samples", "MMD^2", "p", "level", "Frechet distance", "verdict")


def distribution_rows(facts: BundleFacts) -> list[numbers.Row]:
    """The tests of rung 7, if it was measured."""
    tests = [
        test for rung in facts.verify.get("rungs", ()) if rung.get("rung") == 7 for test in rung.get("tests") or ()
    ]
    rows = []
    for test in tests:
        names = (str(test.get("noise", "")), str(test.get("features", "")), str(test.get("count", "")))
        values = tuple(_number(test.get(key)) for key in ("mmd2", "p_value", "level", "frechet"))
        rows.append((*names, *values, "passed" if test.get("passed") else "failed"))
    return rows


BUDGET_HEADS = ("step", "error", "local", "inherited", "growth", "gain", "sampler's own")


def budget_rows(facts: BundleFacts) -> list[numbers.Row]:
    """The error budget over the steps, if it was measured."""
    budget = facts.verify.get("error_budget") or {}
    keys = ("total_max", "local_max", "inherited_max", "growth", "gain", "amplification")
    return [(str(step.get("step")), *(_number(step.get(key)) for key in keys)) for step in budget.get("steps", ())]


def not_checked(facts: BundleFacts) -> list[str]:
    """What the verification says it left out."""
    return list(facts.verify.get("not_checked", ()))


def provenance_rows(facts: BundleFacts) -> list[numbers.Row]:
    """Where a bundle comes from, and the hash of its manifest, which seals all its files."""
    manifest = facts.bundle.manifest
    checkpoint, plan = manifest.checkpoint, manifest.plan
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.toolchain.items()))
    rows: list[numbers.Row] = [
        ("checkpoint", f"{checkpoint.name}, SHA-256 {checkpoint.sha256}"),
        ("licence of the weights", checkpoint.licence or "not stated by the checkpoint"),
        ("plan", f"{str(plan.get('solver')).upper()}, {len(plan.get('steps', ()))} steps"),
        ("timesteps", ", ".join(f"{step['timestep']:g}" for step in plan.get("steps", ()))),
        ("graph", f"{manifest.graph.nodes:,} nodes, {manifest.graph.unique_weight_bytes / 1e6:.2f} MB of weights"),
        ("built with", versions),
        ("manifest", f"SHA-256 {manifest.manifest_sha256}"),
    ]
    if manifest.hardware:
        rows.append(("runs on", ", ".join(f"{name} {value}" for name, value in sorted(manifest.hardware.items()))))
    return rows


def environment_rows(bench: Mapping[str, Any]) -> list[numbers.Row]:
    """What the timings depend on."""
    environment = bench.get("environment", {})
    return [(name.replace("_", " "), _plain(value)) for name, value in environment.items() if value not in (None, {})]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"
