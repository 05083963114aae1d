"""Features of real images, beside what metrics take from them alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

Given = ParamSpec("Given")
Value = TypeVar("Value")


class Real:
    """``features`` (M, d) of one encoder. They stay while samples change, so what depends on them alone is kept."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self._known: dict[Hashable, Any] = {}

    def once(
        self, compute: Callable[Concatenate[Tensor, Given], Value], *given: Given.args, **named: Given.kwargs
    ) -> Value:
        """``compute(features, *given)``, computed for the first call that asks for it."""
        key = (compute, given, tuple(named.items()))
        if key not in self._known:
            self._known[key] = compute(self.features, *given, **named)
        value: Value = self._known[key]
        return value
