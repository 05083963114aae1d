"""The batch sizes that a graph takes, as written after ``--batch`` and in the manifest. No torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmd_export.errors import UsageError

Positive = Annotated[int, Field(ge=1)]


class BatchSpec(BaseModel):
    """The batch sizes a graph takes: either a list of ``sizes`` or a ``range`` from lowest to highest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: tuple[Positive, ...] | None = None
    range: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.sizes is None) == (self.range is None):
            raise ValueError("give either sizes or range")
        if self.sizes is not None and (not self.sizes or list(self.sizes) != sorted(set(self.sizes))):
            raise ValueError(f"sizes {list(self.sizes)} are not ascending and distinct")
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range {list(self.range)} ends before it starts")
        return self

    @classmethod
    def parse(cls, text: str) -> BatchSpec:
        """The value of ``--batch``: ``1``, ``1,4,8`` or ``1..8``."""
        try:
            if ".." in text:
                lowest, highest = text.split("..")
                return cls(range=(int(lowest), int(highest)))
            return cls(sizes=tuple(sorted({int(size) for size in text.split(",")})))
        except ValueError:
            raise UsageError(f"--batch is {text!r}; give a size (1), a list (1,4,8) or a range (1..8)") from None

    def __str__(self) -> str:
        """As written after ``--batch``."""
        if self.range is not None:
            return f"{self.range[0]}..{self.range[1]}"
        return ",".join(str(size) for size in self.sizes or ())

    @property
    def is_static(self) -> bool:
        """Whether the graph takes exactly one batch size."""
        return self.smallest == self.largest

    @property
    def smallest(self) -> int:
        """The smallest batch the graph takes."""
        return self.range[0] if self.range is not None else (self.sizes or (1,))[0]

    @property
    def largest(self) -> int:
        """The largest batch the graph takes."""
        return self.range[1] if self.range is not None else (self.sizes or (1,))[-1]

    def allows(self, n: int) -> bool:
        """Whether a batch of n images can be run as it is."""
        if self.range is not None:
            return self.range[0] <= n <= self.range[1]
        return n in (self.sizes or ())

    def check(self, n: int, bundle: str = "this", name: str = "noise") -> None:
        """Raise ``UsageError`` unless a batch of n images can be run as it is."""
        if not self.allows(n):
            says = f"bundle {bundle} was built for {self}; build with --batch {self._with(n)}"
            raise UsageError(f"input '{name}' has batch {n}, {says}")

    def next_chunk(self, remaining: int) -> int:
        """The batch size to run next with so many images left: the largest that they fill, else the smallest."""
        if self.range is not None:
            return min(max(remaining, self.range[0]), self.range[1])
        filled = [size for size in self.sizes or () if size <= remaining]
        return filled[-1] if filled else self.smallest

    def _with(self, n: int) -> str:
        if self.range is not None and n >= 1:
            return f"{min(n, self.range[0])}..{max(n, self.range[1])}"
        if self.is_static or n < 1:
            return str(max(n, 1))
        return ",".join(str(size) for size in sorted({*(self.sizes or ()), n}))
