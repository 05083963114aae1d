"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that earlier runs left in the user's cache would hide a builder that no longer works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMD_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
