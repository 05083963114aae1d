"""The two libraries: what each is called, whether it is whole, and which of the build options it has. No torch."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability, uninstalled

_ANYWHERE = ("workspace", "memory_limit", "refit", "strip_weights", "cache")


@dataclass(frozen=True)
class Library:
    """One of the two.

    Args:
        name: target, runtime and artefact format of this name.
        title: as its maker writes it.
        modules: what is imported, first of all ``modules[0]``; the others hold its parts, if they are installed.
        core: the shared library that does the work, as the linker calls it.
        options: the fields of TargetOptions that it has.
        needs_gpu: whether it builds for the GPU at hand only.
        rewrite: whether graphs go through ``mmd_export.trt.rewrite`` first.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    core: str
    options: tuple[str, ...]
    needs_gpu: bool
    rewrite: bool = False

    @property
    def module(self) -> str:
        """The name under which it is imported."""
        return self.modules[0]

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'mmd-export[{self.name}]'"

    @property
    def version(self) -> str:
        """The version of the installed package; raises NotAvailableError where there is none."""
        for name in (self.name, f"{self.name}-cu13", f"{self.name}-cu12"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        raise NotAvailableError(
            f"the release of {self.title} is unknown, as no package of it is installed; {self.install}"
        )

    def installed(self) -> Availability:
        """Whether the package is there with its native parts; imports nothing."""
        folders = [folder for name in self.modules for folder in _folders(name)]
        if uninstalled([self.module]):
            return Availability(False, f"{self.name} is not installed", self.install)
        try:
            version = f"{self.name} {self.version}"
        except NotAvailableError:
            version = self.name  # put beside Python by a system package
        missing = [
            what
            for what, found in (
                ("Python extension", any(_extensions(folder) for folder in folders)),
                (f"library {self.core}", any(_native(folder, self.core) for folder in folders) or _linked(self.core)),
            )
            if not found
        ]
        if missing:
            detail = f"{version} is installed without its {' and '.join(missing)}: a stub"
            return Availability(False, detail, f"{self.install} where the maker's own wheels can be had")
        return Availability(True, version)


TENSORRT = Library(
    "tensorrt",
    "TensorRT",
    ("tensorrt", "tensorrt_bindings", "tensorrt_libs"),
    "nvinfer",
    (*_ANYWHERE, "hardware_compat", "version_compat"),
    needs_gpu=True,
)
RTX = Library(
    "tensorrt-rtx",
    "TensorRT-RTX",
    ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"),
    "tensorrt_rtx",
    (*_ANYWHERE, "compress", "compute_capability"),
    needs_gpu=False,
    rewrite=True,
)
LIBRARIES = {library.name: library for library in (TENSORRT, RTX)}


def system() -> str:
    """This operating system and processor, as lock facts write them: ``linux-x86_64``."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{'windows' if sys.platform == 'win32' else sys.platform}-{machine}"


def _folders(module: str) -> list[Path]:
    """The folders of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]


def _extensions(folder: Path) -> list[Path]:
    """Compiled Python modules of a package."""
    return [path for suffix in (".so", ".pyd") for path in folder.rglob(f"*{suffix}") if path.stat().st_size]


def _native(folder: Path, core: str) -> list[Path]:
    """The shared library in a package, under its names on Linux and Windows."""
    patterns = (f"lib{core}*.so*", f"{core}*.dll")
    return [path for pattern in patterns for path in folder.rglob(pattern) if path.stat().st_size]


def _linked(core: str) -> bool:
    """Whether the system's linker knows the library."""
    return ctypes.util.find_library(core) is not None
