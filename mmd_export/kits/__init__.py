"""Embed kits: one file each, found by file name, one ``KIT`` in it. Their sources are in ``runtimes/``."""

from __future__ import annotations

import importlib
import pkgutil

from mmd_export.errors import UsageError
from mmd_export.kit_project import Kit


def kit_names() -> list[str]:
    """Every kit, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_kit(name: str) -> Kit:
    """The kit called ``name``; raises UsageError that lists the known ones."""
    if name not in kit_names():
        raise UsageError(f"--kit {name!r} is unknown; known: {', '.join(kit_names())}")
    kit = importlib.import_module(f"{__name__}.{name}").KIT
    assert isinstance(kit, Kit)
    return kit
