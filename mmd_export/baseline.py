"""The baseline of a gate: the ratio of an artefact to a reference, and what must be the same to compare with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmd_export.bundle import Bundle
from mmd_export.environment import machine
from mmd_export.errors import UsageError
from mmd_export.folders import read_object
from mmd_export.gate import BlockRatio, Blocks, Limit

SCHEMA = 1
_AGAIN = "measure it again with --save-baseline"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Facts):
    """A ratio with its 95 % interval."""

    median: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    blocks: int = Field(ge=1)
    rounds: int = Field(ge=1)


class Model(_Facts):
    """What was run: the weights and the plan, not the artefact, which is what may change."""

    checkpoint: str
    sha256: str
    steps: int
    batch: int

    @classmethod
    def of(cls, bundle: Bundle, batch: int) -> Model:
        """Of a bundle run in batches of that size."""
        checkpoint, steps = bundle.manifest.checkpoint, len(bundle.manifest.plan["steps"])
        return cls(checkpoint=checkpoint.name, sha256=checkpoint.sha256, steps=steps, batch=batch)


class Reference(_Facts):
    """What the artefact is held against: ``against`` as given on the command line, a bundle by its name and hash."""

    against: str
    runs_in: str
    sha256: str | None = None


class Baseline(_Facts):
    """A measured ratio, artefact / reference."""

    schema_version: Literal[1] = 1
    candidate: str
    runs_in: str
    reference: Reference
    model: Model
    machine: dict[str, Any]
    threads: int
    cuda_graph: bool = False  # absent: its reference was not recorded
    ratio: Interval
    environment: dict[str, Any]

    @classmethod
    def parse(cls, data: Mapping[str, Any], path: Path) -> Baseline:
        """Of what the file ``path`` holds; raises UsageError if that is no baseline, or one of another schema."""
        found = data.get("schema_version")
        if found != SCHEMA:
            raise UsageError(f"--gate {path} has schema {found!r}, this version reads schema {SCHEMA}; {_AGAIN}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(f"--gate {path}: {where}: {first['msg']}; {_AGAIN}") from error

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def limit(self, candidate: str, against: str, max_regression: float) -> Limit:
        """What the measured ratio may be."""
        return Limit(candidate, against, 1.0 + max_regression, BlockRatio(**self.ratio.model_dump()))

    @property
    def _run(self) -> Mapping[str, Any]:
        return {"threads": self.threads, "cuda_graph": self.cuda_graph}

    def require_same(self, now: Baseline, path: Path) -> None:
        """Raise UsageError with both values if ``now`` is of another model, machine or reference. Versions may differ.

        The reference's runtime may not: a reference that became faster would look like a slower artefact.
        """
        parts: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
            ("model", self.model.model_dump(), now.model.model_dump()),
            ("machine", self.machine, now.machine),
            ("reference", self.reference.model_dump(), now.reference.model_dump()),
            ("run", self._run, now._run),
        )
        for part, saved, found in parts:
            for name in {**saved, **found}:
                if saved.get(name) != found.get(name):
                    raise UsageError(
                        f"--gate {path} is of another {part}: {name} is {_short(saved.get(name))} there and "
                        f"{_short(found.get(name))} now; {_AGAIN}"
                    )


def baseline_of(
    bundle: Bundle,
    runs_in: str,
    reference: Reference,
    batch: int,
    environment: Mapping[str, Any],
    *,
    threads: int,
    cuda_graph: bool,
) -> Baseline:
    """What this run would save, its ratio still 1: enough for ``require_same`` before anything is measured."""
    return Baseline(
        candidate=bundle.name,
        runs_in=runs_in,
        reference=reference,
        model=Model.of(bundle, batch),
        machine=machine(dict(environment)),
        threads=threads,
        cuda_graph=cuda_graph,
        ratio=Interval(median=1.0, low=1.0, high=1.0, blocks=1, rounds=1),
        environment=dict(environment),
    )


def with_ratio(baseline: Baseline, blocks: Blocks, candidate: str, against: str) -> Baseline:
    """The baseline with what was measured; raises UsageError if that has no interval."""
    ratio = blocks.ratio(candidate, against)
    if ratio.low is None or ratio.high is None:
        raise UsageError(
            f"a baseline takes an interval, {ratio.blocks} blocks of rounds give none; raise --seconds or --rounds"
        )
    return baseline.model_copy(update={"ratio": Interval(**vars(ratio)), "environment": dict(blocks.environment)})


def read_json(path: Path) -> dict[str, Any]:
    """An object from a gate file."""
    return read_object(path, "--gate", _AGAIN)


def _short(value: Any) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 else text
