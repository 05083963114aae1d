"""The most bytes that are alive at once while a list of operations runs in order. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Operation(Generic[Value]):
    """``makes``: value -> bytes. ``inside``: what it needs while it runs, such as a loop for its body."""

    reads: Collection[Value]
    makes: Mapping[Value, int]
    inside: int = 0


def peak_bytes(inputs: Mapping[Value, int], operations: Sequence[Operation[Value]], outputs: Collection[Value]) -> int:
    """A value goes after its last use, ``outputs`` never; what no operation makes, such as a weight, is free."""
    last = {value: place for place, operation in enumerate(operations) for value in operation.reads}
    last |= dict.fromkeys(outputs, -1)
    alive = dict(inputs)
    peak = sum(alive.values())
    for place, operation in enumerate(operations):
        alive |= operation.makes
        peak = max(peak, sum(alive.values()) + operation.inside)
        alive = {value: size for value, size in alive.items() if last.get(value, place) != place}
    return peak
