"""Targets: one file each, found by file name, one ``TARGET`` in it. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmd_export.errors import UsageError
from mmd_export.runtime import Availability

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


@dataclass(frozen=True)
class CompileOptions:
    """What the user may choose; ``form`` is unrolled, loop, or auto, which is one of the two."""

    precision: str = "fp32"
    output: str = "float32"
    form: str = "auto"


@dataclass(frozen=True)
class Compiled:
    """Facts for the manifest that only compiling tells."""

    graph: Mapping[str, Any]
    toolchain: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] | None = None


@runtime_checkable
class Target(Protocol):
    """Compiles a program to one artefact format."""

    name: str
    format: str
    artefact: str
    precisions: tuple[str, ...]
    outputs: tuple[str, ...]
    forms: tuple[str, ...]
    extra: str

    def availability(self) -> Availability:
        """Whether it can build here; imports nothing heavy."""
        ...

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """Write the artefact into ``folder``; deterministic where the compiler is."""
        ...


def target_names() -> list[str]:
    """Every target, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_target(name: str) -> Target:
    """The target called ``name``; raises UsageError that lists the known ones."""
    if name not in target_names():
        raise UsageError(f"--target {name!r} is unknown; known: {', '.join(target_names())}")
    target = importlib.import_module(f"{__name__}.{name}").TARGET
    assert isinstance(target, Target)
    return target
