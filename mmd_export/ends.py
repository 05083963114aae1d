"""The two ends of a network, which stay float32 when the rest becomes half precision: a graph of any kind.

A plan multiplies what the network gives by large numbers (25 at the first step of DDIM on a linear schedule), and the
state that the network reads has no digits to spare either. Both ends are a product with few weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

N = TypeVar("N", bound=Hashable)
Neighbours = Callable[[N], Iterable[N]]
Asks = Callable[[N], bool]


def reading(first: Iterable[N], after: Neighbours[N], is_product: Asks[N]) -> set[N]:
    """From the nodes ``first``, which read the state, to the first product on every way, included."""
    found: set[N] = set()
    pending = list(first)
    while pending:
        if (node := pending.pop()) not in found:
            found.add(node)
            pending += () if is_product(node) else after(node)
    return found


def giving(last: Iterable[N], before: Neighbours[N], is_product: Asks[N], is_sum: Asks[N]) -> set[N]:
    """From the nodes ``last``, which give the output, over the last product to the sum before it, included.

    A sum adds what the network computed to what it computed: a node that reads the state, or another node. Without one
    the product before the last ends it.
    """
    found: set[N] = set()
    seen: set[tuple[N, bool]] = set()
    pending = [(node, False) for node in last]  # with whether the last product lies behind
    while pending:
        node, passed = pending.pop()
        if (node, passed) in seen or (passed and is_product(node)):
            continue
        seen.add((node, passed))
        found.add(node)
        if not (passed and is_sum(node)):
            pending += [(each, passed or is_product(node)) for each in before(node)]
    return found
