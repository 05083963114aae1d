"""What every runtime offers: open a bundle, run it, look inside its chain. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Availability:
    """Whether a target or runtime works on this machine; if not, why, and the line that would change it."""

    available: bool
    detail: str
    install: str = ""


@dataclass(frozen=True)
class RunOptions:
    """``threads``: CPU threads of one run, 0 for the library's choice. ``checkpoint``: MODEL of the torch reference."""

    threads: int = 0
    checkpoint: str | None = None


@runtime_checkable
class Session(Protocol):
    """An artefact ready to run. Inputs and outputs are numpy arrays under the names of the manifest."""

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """One pass noise -> image for one batch that the graph was built for."""
        ...


@runtime_checkable
class ChainSession(Protocol):
    """An artefact opened so that the sampler's chain can be seen; for parity, not for speed."""

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        """Free-running: ``state.1`` ... ``state.K`` and the output, from one pass."""
        ...

    def run_step(self, step: int, known: Arrays) -> Array:
        """Teacher-forced: ``state.<step>`` computed from the given ``state.<step - 1>`` (``noise`` for step 1)."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """One way of running artefacts of certain formats.

    ``unseen`` says why the states inside its artefacts cannot be seen, and is empty where they can.
    """

    name: str
    formats: tuple[str, ...]
    unseen: str

    def availability(self) -> Availability:
        """Look without importing anything heavy."""
        ...

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        """Load the artefact; raises ``NotAvailableError`` or ``BundleError``."""
        ...

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        """Load the artefact with every state as an output; ``NotAvailableError`` where ``unseen`` says why."""
        ...


def as_float32(values: Any) -> NDArray[np.float32]:
    """Contiguous float32 copy or view."""
    return np.ascontiguousarray(values, dtype=np.float32)
