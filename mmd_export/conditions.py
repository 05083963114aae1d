"""What a network is told besides state and timestep: class labels, text states, masks. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmd_export.noise import sampler_noise

CLASS_LABELS = "class_labels"


def outside(values: NDArray[Any], below: int | None) -> tuple[str, str] | None:
    """What ``values`` hold and what is allowed, as "0 to 4", where one of them is not in 0 ... ``below`` - 1."""
    if below is None or not values.size or 0 <= values.min() <= values.max() < below:
        return None
    return f"{values.min()} to {values.max()}", f"0 to {below - 1}"


@dataclass(frozen=True)
class Condition:
    """One input of the network and of the graph, under diffusers' name.

    ``shape`` is that of one image, without the batch; int64 values lie in 0 ... ``below`` - 1. ``values`` (N, *shape)
    are real ones, for the examples: the user's, or sizes in pixels.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...] = ()
    below: int | None = None
    values: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def made_up(self) -> bool:
        """Whether its examples are unit normal numbers, for want of real ones."""
        return self.values is None and self.dtype == "float32"

    def examples(self, seed: int, count: int) -> NDArray[np.float32] | NDArray[np.int64]:
        """Values (count, *shape) for golden files and ranges.

        They are the given ones, over and over, else 0, 1, 2, ... of those allowed, or unit normal ones from ``seed``.
        """
        if self.values is not None:
            given: NDArray[np.float32] | NDArray[np.int64] = self.values[np.arange(count) % len(self.values)]
            return given
        size = math.prod(self.shape)
        if self.dtype == "int64":
            return (np.arange(count * size, dtype=np.int64) % (self.below or 2)).reshape(count, *self.shape)
        return sampler_noise(seed, count, (1, 1, size), 0)["noise"].reshape(count, *self.shape)


def class_condition(classes: int | None) -> tuple[Condition, ...]:
    """The one condition of a class-conditional network; none if ``classes`` is None."""
    return () if classes is None else (Condition(CLASS_LABELS, "int64", (), classes),)


def names_of(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """In the order of the network's and the graph's inputs."""
    return tuple(condition.name for condition in conditions)
