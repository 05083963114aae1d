"""Targets: one file each, found by file name, one ``TARGET`` in it. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmd_export.batch import BatchSpec
from mmd_export.errors import UsageError
from mmd_export.runtime import Availability
from mmd_export.target_options import DEFAULTS, TargetOptions
from mmd_export.tuned_precision import TunedPrecision

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram
    from mmd_export.trt.lock import LockFacts

ONE = BatchSpec(sizes=(1,))


@dataclass(frozen=True)
class CompileOptions:
    """What the user may choose; ``form`` is unrolled, loop, or auto, which is one of the two.

    ``batch``: the sizes that the artefact must take; the program is static where that is one. ``notify`` hears what a
    long compilation is doing; ``log`` is where a compiler's own log goes when it fails. ``tuned``: the precision and
    ranges that the weights were tuned with. ``float32``: values of a call whose operators stay float32 in a lower
    precision.
    """

    precision: str = "fp32"
    output: str = "float32"
    form: str = "auto"
    batch: BatchSpec = ONE
    target: TargetOptions = DEFAULTS
    notify: Callable[[str], None] = lambda _: None
    log: Path | None = None
    tuned: TunedPrecision | None = None
    float32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """Facts for the manifest that only compiling tells."""

    graph: Mapping[str, Any]
    toolchain: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] | None = None


@runtime_checkable
class Target(Protocol):
    """Compiles a program to one artefact format.

    ``modules``: the packages that it imports.
    ``options``: the fields of TargetOptions that it takes. ``several_batches``: whether one artefact can take more than
    one batch size.
    """

    name: str
    format: str
    artefact: str
    modules: tuple[str, ...]
    precisions: tuple[str, ...]
    outputs: tuple[str, ...]
    forms: tuple[str, ...]
    options: tuple[str, ...]
    several_batches: bool
    extra: str

    def availability(self) -> Availability:
        """Whether it can build here; imports nothing heavy."""
        ...

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """Write the artefact into ``folder``; deterministic where the compiler is."""
        ...


@runtime_checkable
class ChecksOptions(Protocol):
    """A target that can say of its options and this machine alone that a build would fail."""

    def require_options(self, precision: str, options: TargetOptions) -> None:
        """Raise UsageError or NotAvailableError before anything is read."""
        ...


@runtime_checkable
class ChecksImages(Protocol):
    """A target whose format does not hold every image as bytes."""

    def require_images(self, batch: int | None, channels: int) -> None:
        """Raise NotAvailableError for those that it does not, before any is computed."""
        ...


@runtime_checkable
class DeferrableTarget(Target, Protocol):
    """One that compiles an ONNX file, and so can do it later, without torch, where the result will run."""

    def compiler(self) -> Availability:
        """Whether it can compile here; ``availability`` also asks for what makes the graph."""
        ...

    def require_buildable(self, model: Path) -> None:
        """Raise NotAvailableError that names what the compiler must not be given, before the graph is deferred."""
        ...

    def compile_onnx(self, model: Path, folder: Path, options: CompileOptions) -> LockFacts:
        """Write the artefact of the graph ``model`` into ``folder``; returns what it is locked to."""
        ...


def target_names() -> list[str]:
    """Every target, by file name; an underscore there is a hyphen in the name."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get_target(name: str) -> Target:
    """The target called ``name``; raises UsageError that lists the known ones."""
    if name not in target_names():
        raise UsageError(f"--target {name!r} is unknown; known: {', '.join(target_names())}")
    target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    assert isinstance(target, Target)
    return target
