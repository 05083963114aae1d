"""``mmd-export doctor``: what this machine can build and run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import packages_distributions, version
from typing import Any

from mmd_export import __version__
from mmd_export.exit_codes import how_it_ended
from mmd_export.runtime import Availability, Runtime, uninstalled
from mmd_export.targets import Target, get_target, target_names
from mmd_runtime.registry import every_runtime

_IMPORT_TIMEOUT = 120.0  # seconds; coremltools takes 12
# -P: not from the current folder. Why the telemetry of openvino is hidden: ``mmd_export.openvino_library``.
_TRIAL = "import importlib, sys; sys.modules['openvino_telemetry'] = None; importlib.import_module(sys.argv[1])"


def doctor(imports: bool = False, notify: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """What can be built and run on this machine, and the pip line for the rest.

    ``imports``: also import what is installed, each package in a process of its own, of which ``notify`` hears.
    A row a target and a runtime, one with each of its providers: whether it builds (targets), the runtimes that run it
    here (targets) or itself (runtimes), and what is missing.
    """
    known: dict[str, str] = {}

    def look(part: Target | Runtime) -> Availability:
        there = [name for name in part.modules if imports and not uninstalled([name])]
        # Before the availability, which may import, and crash with, what is broken.
        return broken_import(there, known, notify) or part.availability()

    runtimes = [(runtime, look(runtime)) for runtime in every_runtime()]
    rows: list[dict[str, Any]] = []
    for name in target_names():
        target = get_target(name)
        found = look(target)
        able = [runtime for runtime, _ in runtimes if target.format in runtime.formats]
        here = [runtime.name for runtime, works in runtimes if runtime in able and works.available]
        rows.append(
            {
                "kind": "target",
                "name": name,
                **vars(found),
                "format": target.format,
                "precisions": list(target.precisions),
                "runs_in": here,
                "could_run_in": [runtime.name for runtime in able if runtime.name not in here],
            }
        )
    for runtime, found in runtimes:
        rows.append({"kind": "runtime", "name": runtime.name, **vars(found), "formats": list(runtime.formats)})
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    return {"mmd_export": __version__, "machine": machine, "parts": rows}


def doctor_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Kind, name, whether it builds here, whether and in what it runs here, detail, pip line; as text."""
    rows: list[tuple[str, ...]] = []
    for part in facts["parts"]:
        works = "yes" if part["available"] else "no"
        detail, builds, runs = part["detail"], "-", works
        if part["kind"] == "target":
            runs = ", ".join(part["runs_in"]) or "no"
            builds, detail = works, f"{detail}; {', '.join(part['precisions'])}"
        rows.append((part["kind"], part["name"], builds, runs, detail, part["install"]))
    return rows


def broken_import(
    modules: Iterable[str], known: dict[str, str], notify: Callable[[str], None] = lambda _: None
) -> Availability | None:
    """What says which of ``modules`` does not import, if one does not; ``known`` keeps why for each that was tried."""
    for name in modules:
        if name not in known:
            notify(f"importing {name}")
            known[name] = why_not(name)
        if why := known[name]:
            return Availability(False, f"{name} is installed but does not import: {why}", repair(name, why))
    return None


def repair(module: str, why: str) -> str:
    """What to do where ``module`` does not import; no version is changed, no dependency but where one is missing."""
    if "cannot open shared object file" in why:
        return "install the library that it names: a package of the system, or for CUDA's pip install 'mmd-export[gpu]'"
    packages = sorted(set(packages_distributions().get(module.partition(".")[0], [])))
    if not packages:
        return "install it again from where it came"
    if len(packages) > 1 and "." not in module:
        return f"keep one of {', '.join(packages)}, which overwrite each other: pip uninstall them all, then install it"
    if local := [name for name in packages if "+" in version(name)]:  # a build that PyPI does not have
        return f"install {local[0]} {version(local[0])} again from where it came"
    alone = "" if why.startswith("ModuleNotFoundError") else " --no-deps"
    return f"pip install --force-reinstall{alone} {' '.join(f'{name}=={version(name)}' for name in packages)}"


def why_not(module: str) -> str:
    """Why a process that imports it fails, in one line; empty if it does not."""
    try:
        command = [sys.executable, "-P", "-c", _TRIAL, module]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"it took more than {_IMPORT_TIMEOUT:.0f} s"
    if ended.returncode == 0:
        return ""
    said = ended.stderr.strip().splitlines()
    return said[-1] if ended.returncode > 0 and said else f"it {how_it_ended(ended.returncode)}"
