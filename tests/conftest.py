"""What holds for all tests."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What torch lists anew for every export, always the same, in a third of a second, is listed once.

    Nor does it write down where in the source each operator was called, but for the contract tests: they look for the
    paths of this machine in every artefact.
    """
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration and not hasattr(registration.ONNXRegistry.from_torchlib, "cache_info"):
        registry = registration.ONNXRegistry
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    if tracing := sys.modules.get("torch.fx.config"):
        tracing.do_not_emit_stack_traces = not item.nodeid.startswith("tests/contract/")  # type: ignore[attr-defined]
    utilities = sys.modules.get("torch._export.utils")
    if utilities and not hasattr(utilities._materialize_cpp_cia_ops, "__wrapped__"):
        utilities._materialize_cpp_cia_ops = _once_a_listing(utilities._materialize_cpp_cia_ops)  # type: ignore[attr-defined]


def _once_a_listing(look_up: Callable[[], None]) -> Callable[[], None]:
    """``look_up``, which makes torch look up its composite operators, again only when a library has registered more."""
    last: list[str] = []

    @functools.wraps(look_up)
    def wrapper() -> None:
        import torch

        listed = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if listed != last:
            look_up()
            last[:] = listed

    return wrapper
