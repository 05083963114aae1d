"""The gates of ``bench``: against a baseline file, against limits in a file, or against another bundle measured now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmd_export.baseline import Baseline, Reference, baseline_of, read_json, with_ratio
from mmd_export.commands.candidates import BenchOptions, Candidate
from mmd_export.environment import describe_environment
from mmd_export.errors import MmdExportError, UsageError
from mmd_export.gate import BlockPlan, Blocks, Limit

DEFAULT_REGRESSION = 0.05


@dataclass(frozen=True)
class Gates:
    """What ``--gate``, ``--max-regression`` and ``--save-baseline`` ask for.

    ``file`` None: the first bundle against the first ``--against``, which is to be as fast. A file is a baseline, or
    limits: ``{"gates": [{"against": "torch", "max_ratio": 0.5}]}``, the first bundle may take so many times the other.
    """

    file: Path | None = None
    max_regression: float = DEFAULT_REGRESSION
    save: Path | None = None
    _read: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path | None, max_regression: str | None, save: Path | None) -> Gates | None:
        """From the command line; None where nothing was asked for."""
        if file is None and max_regression is None and save is None:
            return None
        if save is not None and (file is not None or max_regression is not None):
            raise UsageError(
                "--save-baseline measures a new baseline and judges nothing; leave out --gate, --max-regression"
            )
        share = DEFAULT_REGRESSION if max_regression is None else parse_share(max_regression)
        gates = cls(file, share, save, {} if file is None else read_json(file))
        if max_regression is not None and (rows := gates.rows) is not None:
            told = ", ".join(f"{name} {most:g}" for name, most in rows)
            raise UsageError(
                f"--max-regression {max_regression} has no place beside --gate {file}, which has limits of its own: "
                f"{told}; leave it out, or give a baseline"
            )
        return gates

    @property
    def rows(self) -> list[tuple[str, float]] | None:
        """The limits of a file that holds some, else None."""
        if "gates" not in self._read:
            return None
        try:
            found = [(str(row["against"]), float(row["max_ratio"])) for row in self._read["gates"]]
            if not found or not all(math.isfinite(most) and most > 0.0 for _, most in found):
                raise ValueError("give at least one limit, each finite and above 0")
            return found
        except (ValueError, KeyError, TypeError) as error:
            example = '{"gates": [{"against": "torch", "max_ratio": 0.5}]}'
            reason = f"{type(error).__name__} {error}"
            raise UsageError(f"--gate {self.file} is not of the form {example}: {reason}") from error

    @property
    def baseline(self) -> Baseline | None:
        """The baseline of a file that is one."""
        return Baseline.parse(self._read, self.file) if self.file is not None and self.rows is None else None

    def against(self, options: BenchOptions) -> tuple[str, ...]:
        """What to measure beside the bundles: as given, else what the file names."""
        if options.against:
            return options.against
        if (rows := self.rows) is not None:
            return tuple(name for name, _ in rows)
        if (baseline := self.baseline) is not None and baseline.reference.sha256 is None:
            return (baseline.reference.against,)
        needed = "the reference of its baseline" if self.file else "what is to be as fast, such as the old bundle"
        raise UsageError(f"a gate takes a reference that is measured now; pass --against with {needed}")


@dataclass(frozen=True)
class SettledGates:
    """The limits to judge, or the baseline to measure."""

    limits: tuple[Limit, ...]
    baseline: Baseline | None = None
    reference: str = ""

    def measured(self, blocks: Blocks) -> Baseline | None:
        """The baseline with the ratio that was measured, if one was asked for."""
        if self.baseline is None:
            return None
        return with_ratio(self.baseline, blocks, self.baseline.candidate, self.reference)


def gate_plan(options: BenchOptions) -> BlockPlan:
    """How long to measure; raises UsageError for less than a gate takes, or more."""
    return BlockPlan(rounds=options.rounds) if options.seconds is None else BlockPlan(options.seconds, options.rounds)


def settled_gates(
    gates: Gates, found: Sequence[Candidate], bundles: int, batch: int, options: BenchOptions
) -> SettledGates:
    """The limits on the first bundle; raises UsageError if the file is of another machine, model or reference."""
    candidate, others = found[0], found[1:]
    if (rows := gates.rows) is not None:
        held = [(_named(name, others, gates), most) for name, most in rows]
        return SettledGates(tuple(_direct(candidate, reference, most) for reference, most in held))
    reference = found[bundles] if len(found) > bundles else None
    saved = gates.baseline
    if saved is not None:
        reference = _reference(saved, others, gates)
    if reference is None or candidate.bundle is None:
        raise MmdExportError("a gate has no reference; pass --against")
    described = Reference(against=reference.against, runs_in=reference.runs_in, sha256=_sha256(reference))
    now = baseline_of(
        candidate.bundle, candidate.runs_in, described, batch, describe_environment(),
        threads=options.threads, cuda_graph=options.cuda_graph,
    )  # fmt: skip
    if gates.save is not None:
        return SettledGates((), now, reference.name)
    if saved is None or gates.file is None:
        return SettledGates((_direct(candidate, reference, 1.0 + gates.max_regression),))
    saved.require_same(now, gates.file)
    return SettledGates((saved.limit(candidate.name, reference.name, gates.max_regression),))


def _direct(candidate: Candidate, reference: Candidate, most: float) -> Limit:
    """Without a baseline, which would tell the runtime of its reference.

    Raises UsageError for a bundle in another runtime that nobody named: the limit would judge the runtimes.
    """
    if reference.bundle is not None and reference.runtime != candidate.runtime and not reference.named:
        raise UsageError(
            f"the gate is on two bundles, {candidate.name} runs in {candidate.runtime} and {reference.name} in "
            f"{reference.runtime}; if that is meant, pass --against {reference.bundle.folder}@{reference.runtime}"
        )
    return Limit(candidate.name, reference.name, most)


def _sha256(candidate: Candidate) -> str | None:
    """Of a bundle that is the reference itself; a runtime runs the candidate, which may change."""
    return candidate.sha256 if candidate.bundle is not None and candidate.against == candidate.bundle.name else None


def _reference(saved: Baseline, others: Sequence[Candidate], gates: Gates) -> Candidate:
    for each in others:
        if each.against == saved.reference.against:
            return each
    known = ", ".join(each.against for each in others)
    raise UsageError(
        f"--gate {gates.file} is held against {saved.reference.against!r}; measured are {known}; pass --against "
        f"{saved.reference.against}"
    )


def _named(name: str, others: Sequence[Candidate], gates: Gates) -> Candidate:
    for each in others:
        if name in (each.name, each.against):
            return each
    known = ", ".join(each.name for each in others)
    raise UsageError(f"--gate {gates.file} names {name!r}; measured are {known}; add --against {name}")


def parse_share(text: str) -> float:
    """``5%`` or ``0.05``."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100.0 if percent else 1.0)
    except ValueError:
        raise UsageError(f"--max-regression is {text!r}; give a share such as 5% or 0.05") from None
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"--max-regression is {text}, {100 * value:g} %; give 0% to 100%")
    return value
