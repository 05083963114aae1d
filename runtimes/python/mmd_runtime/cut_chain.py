"""A sampler's graph opened up: whole with its states as outputs, or the parts between two states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable

from mmd_export.bundle import Bundle
from mmd_export.errors import UsageError
from mmd_export.runtime import Array, Arrays
from mmd_runtime.chunks import check_array, check_inputs

Call = Callable[[Arrays], dict[str, Array]]  # takes what it needs of the arrays; outputs by name
_STEP_SESSIONS_BYTES = 2**28


class CutChain(ABC):
    """The checks and the keeping of sessions that every runtime shares which can cut its graph."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._steps = bundle.golden().steps
        self._whole: Call | None = None
        self._cuts: OrderedDict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], Call] = OrderedDict()

    @abstractmethod
    def _open_whole(self) -> Call:
        """The graph with ``state.1`` ... ``state.K`` beside its outputs."""

    @abstractmethod
    def _open_step(self, step: int, known: Arrays) -> Call:
        """The part that computes ``state.<step>`` from values in ``known``."""

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        """``state.1`` ... ``state.K`` and the outputs, from one pass."""
        check_inputs(self._bundle, inputs)
        if self._whole is None:
            self._whole = self._open_whole()
        return self._whole(inputs)

    def run_step(self, step: int, known: Arrays) -> Array:
        """``state.<step>`` from ``state.<step - 1>`` (``noise`` for step 1) and what else that step reads."""
        if not 1 <= step <= self._steps:
            raise UsageError(f"bundle {self._bundle.name}: step {step} is asked for; it has steps 1 to {self._steps}")
        before = "noise" if step == 1 else f"state.{step - 1}"
        if before not in known:
            raise UsageError(f"bundle {self._bundle.name}: step {step} starts from '{before}', given: {sorted(known)}")
        for name, array in known.items():
            self._check_known(name, array)
        self._whole = None  # its copy of the weights; made again if it is asked for
        return self._forced(step, known)

    def _forced(self, step: int, known: Arrays) -> Array:
        return self._cut(step, known)(known)[f"state.{step}"]

    def _check_known(self, name: str, array: Array) -> None:
        specs = {spec.name: spec for spec in self._bundle.manifest.inputs}
        if name.startswith("state."):
            specs[name] = specs["noise"].model_copy(update={"name": name})
        if name in specs:
            check_array(self._bundle, array, specs[name])

    def _cut(self, step: int, known: Arrays) -> Call:
        """The session of one step; so many are kept as have their weights in 256 MiB."""
        key = step, tuple(sorted((name, tuple(array.shape)) for name, array in known.items()))
        if key not in self._cuts:
            keep = max(1, _STEP_SESSIONS_BYTES // max(1, self._bundle.manifest.graph.unique_weight_bytes))
            while len(self._cuts) >= keep:
                self._cuts.popitem(last=False)
            self._cuts[key] = self._open_step(step, known)
        self._cuts.move_to_end(key)
        return self._cuts[key]
