"""Python files of embedded projects, as modules of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.contract.required import skip


def module_of(path: Path) -> ModuleType:
    """The file as a module of its own, whatever else has its name."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes are looked up there by their annotations
    spec.loader.exec_module(module)
    return module


def require_ray() -> None:
    """Skip the module where Ray is not installed; where the kit is required, that is a failure."""
    if importlib.util.find_spec("ray") is None:
        skip("kit", "ray", "ray missing; pip install 'ray[serve]'")
