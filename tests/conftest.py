"""What holds for all tests."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that earlier runs left in the user's cache would hide a builder that no longer works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMD_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure() -> None:
    """Fewer garbage collections: they took a tenth of a run, in which torch.export makes many objects that live."""
    gc.set_threshold(200_000, 20, 20)


def pytest_collection_finish() -> None:
    """What is imported is no garbage, and need not be looked at again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """onnxscript lists its operators anew for every export, always the same, in a third of a second; once will do."""
    for name, module in list(sys.modules.items()):
        if name.startswith("onnxscript._framework_apis.torch_") and not hasattr(module.get_torchlib_ops, "cache_info"):
            module.get_torchlib_ops = functools.cache(module.get_torchlib_ops)  # type: ignore[attr-defined]
