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


def reached(first: Iterable[N], neighbours: Neighbours[N]) -> set[N]:
    """The nodes ``first``, and all that ``neighbours`` lead to."""
    found: set[N] = set()
    pending = list(first)
    while pending:
        if (node := pending.pop()) not in found:
            found.add(node)
            pending += neighbours(node)
    return found


def reading(first: Iterable[N], after: Neighbours[N], is_product: Asks[N]) -> set[N]:
    """From the nodes ``first``, which read the state, to the first product on every way, included."""
    return reached(first, lambda node: () if is_product(node) else after(node))


def phases(first: Iterable[N], after: Neighbours[N], before: Neighbours[N], sinusoids: Iterable[N]) -> set[N]:
    """Those ``sinusoids`` that do not depend on the nodes ``first``, which read the state, and what they are made of.

    The phase of a size is as large as the size: at 1000 radians float16 steps by a half and bfloat16 by 4, so the sine
    of a rounded phase is that of another one. diffusers has them in float32 in pipelines of half precision too. Those
    that depend on the state are not told from activations; their phases come out of products in half precision.
    """
    of_state = reached(first, after)
    return reached([node for node in sinusoids if node not in of_state], before)


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
