from __future__ import annotations

import pytest

from benchmarks.faults import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Honest bundles of the faults' small network, made when they are first asked for."""
    return Lab(tmp_path_factory.mktemp("lab"))
