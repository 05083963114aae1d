"""What every runtime offers: open a bundle, run it, look inside its chain. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
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


def uninstalled(modules: Iterable[str]) -> str:
    """The packages of those that are not installed, as text. Nothing is imported: one that is there may be broken."""
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in modules if not _found(name)))


def _found(module: str) -> bool:
    """``find_spec`` of a dotted name would import its parents."""
    first, *rest = module.split(".")
    name, spec = first, find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec is not None


@dataclass(frozen=True)
class RunOptions:
    """How to open an artefact.

    ``threads``: CPU threads of one run, 0 for the library's choice. ``checkpoint``: MODEL of the torch reference.
    ``cuda_graph``: record the run on the GPU once and replay it, where the runtime can. ``read``: gives the checkpoint
    of a bundle that the torch reference would read itself.
    """

    threads: int = 0
    checkpoint: str | None = None
    cuda_graph: bool = False
    read: Callable[[Bundle], Any] | None = None


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run that its provider need not take whole.

    ``taken``: how many the provider runs. ``elsewhere``: the names of the others, by the provider that runs them.
    ``unknown`` says why none of this is known.
    """

    provider: str
    taken: int = 0
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: str = ""

    @property
    def summary(self) -> str:
        """One line: the counts, and of the nodes elsewhere how many there are of each operator."""
        if self.unknown:
            return f"where the nodes run is not known: {self.unknown}"
        others = sum(len(names) for names in self.elsewhere.values())
        parts = [f"{self.taken:,} of {self.taken + others:,} nodes run on {self.provider}"]
        for provider, names in self.elsewhere.items():
            kinds = Counter(name.split(" ")[0] for name in names)
            parts.append(f"{len(names)} on {provider} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, every node elsewhere by name."""
        elsewhere = {provider: list(names) for provider, names in self.elsewhere.items()}
        return {"provider": self.provider, "taken": self.taken, "elsewhere": elsewhere, "unknown": self.unknown}


@runtime_checkable
class Session(Protocol):
    """An artefact ready to run. Inputs and outputs are numpy arrays under the names of the manifest.

    Threads may share it: each gets the outputs of its own inputs, whether or not the library runs one at a time.
    """

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
class PlacedSession(Protocol):
    """A session that knows where its nodes run."""

    placement: Placement


class Bound(Protocol):
    """A session with its inputs and outputs on the device: a call runs it, and copies nothing."""

    def __call__(self) -> None:
        """One pass, waited for."""
        ...

    def outputs(self) -> dict[str, Array]:
        """What the last pass gave, copied."""
        ...


@runtime_checkable
class EventTimed(Protocol):
    """Something bound that can be timed by the clock of its device."""

    def device_seconds(self) -> float:
        """One pass, between two events on the stream that it runs on."""
        ...


@runtime_checkable
class BindingSession(Protocol):
    """A session whose inputs and outputs can stay on the device from pass to pass."""

    def bind(self, inputs: Arrays) -> Bound:
        """Copy ``inputs`` there once."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """One way of running artefacts of certain formats.

    ``modules``: the packages that it imports. ``unseen`` says why the states inside its artefacts cannot be seen, and
    is empty where they can.
    """

    name: str
    formats: tuple[str, ...]
    modules: tuple[str, ...]
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


@runtime_checkable
class ProviderRuntime(Protocol):
    """A runtime that hands its work to one of several providers: ``RUNTIME:PROVIDER`` by name."""

    providers: tuple[str, ...]

    def on(self, provider: str) -> Runtime:
        """The same with ``provider``; UsageError lists the known ones."""
        ...


@runtime_checkable
class GraphRuntime(Protocol):
    """A runtime that knows whether it takes ``RunOptions.cuda_graph`` or refuses it."""

    records_graphs: bool


def records_graphs(runtime: Runtime) -> bool:
    """Whether its runs can be recorded as CUDA graphs."""
    return isinstance(runtime, GraphRuntime) and runtime.records_graphs


def placement_of(session: Session) -> Placement | None:
    """Where the nodes run, of a session that can tell."""
    return session.placement if isinstance(session, PlacedSession) else None


def runs_whole(chain: ChainSession | None) -> bool:
    """Whether the chain says ``whole``: it runs the artefact as it is, and its sample is that of ``Session.run``."""
    return getattr(chain, "whole", False) is True


def as_float32(values: Any) -> NDArray[np.float32]:
    """Contiguous float32 copy or view."""
    return np.ascontiguousarray(values, dtype=np.float32)
