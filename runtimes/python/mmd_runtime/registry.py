"""Runtimes found by file name: every module of this package with a constant ``RUNTIME``. Nothing heavy is imported."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import mmd_runtime
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.runtime import ProviderRuntime, Runtime


def runtime_names() -> tuple[str, ...]:
    """The names of all runtimes, sorted."""
    return tuple(_runtimes())


def every_runtime() -> tuple[Runtime, ...]:
    """All runtimes, each followed by itself with every provider that it has."""
    found: list[Runtime] = []
    for runtime in _runtimes().values():
        found.append(runtime)
        if isinstance(runtime, ProviderRuntime):
            found += [runtime.on(provider) for provider in runtime.providers]
    return tuple(found)


def get_runtime(name: str) -> Runtime:
    """The runtime of that name, ``RUNTIME`` or ``RUNTIME:PROVIDER``; ``UsageError`` lists the known ones."""
    runtimes = _runtimes()
    family, colon, provider = name.partition(":")
    if family not in runtimes:
        raise UsageError(f"runtime {name!r} is unknown; known: {', '.join(runtimes)}")
    runtime = runtimes[family]
    if not colon:
        return runtime
    if not isinstance(runtime, ProviderRuntime):
        raise UsageError(f"runtime {family} has no providers, {name!r} names one; leave out ':{provider}'")
    return runtime.on(provider)


def runtime_for(artefact_format: str) -> Runtime:
    """The first runtime by name that runs artefacts of the format here, else the first that runs them at all."""
    able = [runtime for runtime in _runtimes().values() if artefact_format in runtime.formats]
    if not able:
        known = sorted({known for runtime in _runtimes().values() for known in runtime.formats})
        raise NotAvailableError(f"no runtime runs {artefact_format!r} artefacts; known formats: {', '.join(known)}")
    return next((runtime for runtime in able if runtime.availability().available), able[0])


@cache
def _runtimes() -> dict[str, Runtime]:
    found: dict[str, Runtime] = {}
    for module in sorted(pkgutil.iter_modules(mmd_runtime.__path__), key=lambda module: module.name):
        runtime = getattr(importlib.import_module(f"mmd_runtime.{module.name}"), "RUNTIME", None)
        if runtime is None:
            continue
        name = module.name.replace("_", "-")
        if not isinstance(runtime, Runtime) or runtime.name != name:
            raise TypeError(f"mmd_runtime.{module.name}.RUNTIME is no Runtime of the name {name!r}")
        found[name] = runtime
    return found
