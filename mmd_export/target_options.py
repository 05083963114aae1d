"""What only some targets let the user choose. No torch.

A field that is None was not given: the target's own default holds. A target names the fields that it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmd_export.errors import NotAvailableError, UsageError

HARDWARE_COMPAT = ("ampere+", "same-compute-capability")
DEVICES = ("cpu", "cuda")
_MOST_MEMORY = 2**31  # MiB; in bytes it fits the signed integers of the libraries
MOST_CALIBRATION = 4096  # images, of which every trajectory is run

# Of the building machine, or used up when the graph was made: no part of a recipe.
_NOT_LATER = ("cache", "memory_limit", "calibration")


@dataclass(frozen=True)
class TargetOptions:
    """Every option of every target, named as on the command line.

    Args:
        workspace: scratch memory that the builder may plan with, MiB.
        memory_limit: memory of the builder's process, MiB.
        hardware_compat: ``ampere+`` or ``same-compute-capability``: engines for more GPUs than the one at hand.
        version_compat: engines that newer releases of the library load too.
        refit: engines whose weights can be replaced.
        strip_weights: engines without weights, to be refitted from the ONNX file beside them.
        compress: keep the engine packed with xz; it is unpacked into memory when the bundle is opened.
        compute_capability: GPUs to compile for without one at hand, such as ``8.9,12.0``.
        cache: folder of timing caches and finished engines.
        deployment_target: oldest system that shall run it, such as ``iOS17`` or ``macOS14``.
        compute_units: where it shall run there: ``all``, ``cpu``, ``cpu-gpu`` or ``cpu-ane``.
        calibration: images whose trajectories set the ranges of quantised values.
        device: ``cpu`` or ``cuda``; where graphs run on both, ``cpu`` chooses the form that is faster there.
    """

    workspace: int | None = None
    memory_limit: int | None = None
    hardware_compat: str | None = None
    version_compat: bool | None = None
    refit: bool | None = None
    strip_weights: bool | None = None
    compress: bool | None = None
    compute_capability: str | None = None
    cache: Path | None = None
    deployment_target: str | None = None
    compute_units: str | None = None
    calibration: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a value that no target could take."""
        for name in ("workspace", "memory_limit"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= _MOST_MEMORY:
                raise UsageError(f"{flag(name)} is {value} MiB; it must be from 1 to {_MOST_MEMORY:,}")
        if self.hardware_compat not in (None, *HARDWARE_COMPAT):
            raise UsageError(f"--hardware-compat is {self.hardware_compat!r}; give {' or '.join(HARDWARE_COMPAT)}")
        if self.device not in (None, *DEVICES):
            raise UsageError(f"--device is {self.device!r}; give {' or '.join(DEVICES)}")
        if self.compute_capability is not None and not re.fullmatch(r"\d+\.\d(,\d+\.\d)*", self.compute_capability):
            raise UsageError(f"--compute-capability is {self.compute_capability!r}; give numbers such as 8.9,12.0")
        if self.calibration is not None and not 1 <= self.calibration <= MOST_CALIBRATION:
            raise UsageError(
                f"--calibration is {self.calibration}; it must be from 1 to {MOST_CALIBRATION:,} images; leave it out "
                "for the default"
            )

    def stored(self, artefact: str) -> str:
        """What a target's artefact is called in the bundle."""
        return f"{artefact}.xz" if self.compress else artefact

    def recipe(self) -> dict[str, int | str]:
        """What was given and still matters when a deferred bundle is compiled, as plain values."""
        return {name: getattr(self, name) for name in self.given if name not in _NOT_LATER}

    @classmethod
    def from_recipe(
        cls, recipe: Mapping[str, int | str], cache: Path | None, memory_limit: int | None
    ) -> TargetOptions:
        """The options of a recipe on a machine; raises UsageError for one that is not known."""
        known = [field.name for field in fields(cls) if field.name not in _NOT_LATER]
        for name in recipe:
            if name not in known:
                raise UsageError(f"the bundle's recipe has the unknown option {name!r}; update mmd-export")
        given: dict[str, Any] = dict(recipe)
        return cls(**given, cache=cache, memory_limit=memory_limit)

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the fields that were given."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def require_known(self, target: str, known: Sequence[str]) -> None:
        """Raise NotAvailableError for the first field that is given and that the target does not take."""
        for name in self.given:
            if name not in known:
                has = ", ".join(map(flag, known)) or "no options of its own"
                raise NotAvailableError(f"target {target} has no {flag(name)}; it has {has}")


DEFAULTS = TargetOptions()


def flag(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")
