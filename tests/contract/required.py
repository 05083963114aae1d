"""Skips of the contract tests: those that CI names may not skip."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip(kind: str, name: str, reason: str) -> NoReturn:
    """Skip with the reason, or fail if MMD_EXPORT_REQUIRED_TARGETS, _RUNTIMES or _KITS (space-separated) has it."""
    if name in os.environ.get(f"MMD_EXPORT_REQUIRED_{kind.upper()}S", "").split():
        pytest.fail(f"{kind} {name} may not skip here: {reason}")
    pytest.skip(f"{kind} {name}: {reason}", allow_module_level=True)
