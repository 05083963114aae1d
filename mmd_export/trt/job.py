"""What the builder's process is told, as JSON. Standard library only: that process loads nothing else of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

REFUSED = 3  # exit code of a builder that says why it cannot


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Args:
        module: the library, as it is imported.
        onnx: the graph; its external weights lie beside it.
        engine: the file to write.
        batches: an optimisation profile each: least, best and most images; none for a static graph.
        capabilities: compute capabilities such as 8.9; none for all that the library has, from ``least_capability`` on.
        workspace: MiB of scratch memory that it may plan with.
        memory_limit: MiB of memory of its own, above which its process is ended.
        timing_cache: file with the timings of earlier builds; read if it is there, and written.
    """

    module: str
    onnx: str
    engine: str
    batches: tuple[tuple[int, int, int], ...] = ()
    capabilities: tuple[str, ...] = ()
    least_capability: str = "8.0"
    workspace: int | None = None
    memory_limit: int | None = None
    hardware_compat: str | None = None
    version_compat: bool = False
    refit: bool = False
    strip_weights: bool = False
    timing_cache: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The same back."""
        fields = json.loads(text)
        fields["batches"] = tuple(tuple(sizes) for sizes in fields["batches"])
        fields["capabilities"] = tuple(fields["capabilities"])
        return cls(**fields)


def profile_batches(sizes: Sequence[int] | None, limits: tuple[int, int] | None) -> tuple[tuple[int, int, int], ...]:
    """Least, best and most images of every optimisation profile.

    A list of sizes is a profile each, exact; a range is one profile that is best at its upper end. One size is none.
    """
    if limits is not None:
        return () if limits[0] == limits[1] else ((limits[0], limits[1], limits[1]),)
    exact = tuple(sizes or ())
    return () if len(exact) < 2 else tuple((size, size, size) for size in exact)
