"""What packages older than the pinned ones cannot do, so that ``make floors`` skips it and says why."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, least: str, why: str) -> None:
    """Skip the test under an older ``package``."""
    if Version(found := version(package)) < Version(least):
        pytest.skip(f"{package} {found}, not {least}: {why}")
