"""What ``bench`` can run: bundles in their runtimes, and other ways to the same image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle, batch_axis
from mmd_export.commands.verify import BUILT_IN, opens, usable_runtime
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.runtime import BindingSession, Placement, RunOptions, placement_of, records_graphs
from mmd_runtime.registry import get_runtime, runtime_names

if TYPE_CHECKING:
    from mmd_export.checkpoint import Checkpoint

TORCH_BASELINES = ("diffusers", "per-step", "torch-compile")
BASELINES = ("torch", *TORCH_BASELINES)
NOT_TIMED = {"coreml-reference": "reference evaluation says nothing of the speed of Core ML; bench it on macOS"}

Inputs = Mapping[str, NDArray[Any]]
Call = Callable[[], object]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    ``against``: baselines, runtimes, bundles, or ``BUNDLE@RUNTIME``. ``rounds`` None: as many as fit into ``seconds``,
    30 by default, between 10 and 200; a gate takes 45 at most by default, and ends as soon as it is sure. ``threads``
    0: each library's choice. ``bound``: inputs and outputs stay on the device, so that a run copies nothing.
    ``batches``: empty for the batch of the golden inputs. ``cold``: fresh processes of each bundle. ``cuda_graph``:
    the bundles' runs are recorded once and replayed.
    """

    bundles: tuple[Path, ...]
    against: tuple[str, ...] = ()
    runtime: str | None = None
    checkpoint: str | None = None
    rounds: int | None = None
    seconds: float | None = None
    threads: int = 0
    bound: bool = False
    batches: tuple[int, ...] = ()
    percentiles: tuple[float, ...] = ()
    cold: int = 0
    cuda_graph: bool = False


@dataclass
class Candidate:
    """``open`` opens a session anew, where there is one, and returns one inference as a call.

    ``runs_in``: runtime and version. ``sha256``: of a bundle's artefact. ``bundle`` and ``runtime``: of one that can be
    started in a fresh process. ``named``: ``--against`` names that runtime.
    """

    name: str
    against: str
    runs_in: str
    open: Callable[[], Call]
    bundle: Bundle | None = None
    runtime: str = ""
    named: bool = False
    placements: list[Placement] = field(default_factory=list)

    @property
    def sha256(self) -> str | None:
        """Of the artefact, where it is a bundle's."""
        return None if self.bundle is None else self.bundle.artefact_sha256

    @property
    def told(self) -> str:
        """What it runs in, and that this is not the engine where a bundle is still to be compiled."""
        recipe = None if self.bundle is None else self.bundle.manifest.deferred
        if self.bundle is None or recipe is None:
            return f"{self.name} runs in {self.runs_in}"
        engine = f"not the {recipe.format} engine; run mmd-export finalize {self.bundle.folder} first"
        return f"{self.name} runs in {self.runs_in}, {engine}"


def inputs_of(bundle: Bundle, batch: int) -> dict[str, NDArray[Any]]:
    """The first golden inputs as a batch of that size, from the first image again where there are too few."""
    bundle.manifest.batch.check(batch, bundle.name)
    golden = bundle.golden()
    rows = np.arange(batch) % golden.count
    return {
        name: np.ascontiguousarray(np.take(array, rows, axis=batch_axis(name))) for name, array in golden.inputs.items()
    }


class Checkpoints:
    """The checkpoints of bundles, each read once; ``model`` stands for the name that is in a bundle."""

    def __init__(self, model: str | None = None) -> None:
        self._model = model
        self._read: dict[str, Checkpoint] = {}

    def of(self, bundle: Bundle) -> Checkpoint:
        """The checkpoint that a bundle was built from; raises UsageError where it is another."""
        from mmd_export.checkpoint import load_matching

        wanted = bundle.manifest.checkpoint
        key = wanted.model_dump_json()
        if key not in self._read:
            self._read[key] = load_matching(self._model or wanted.name, wanted)
        return self._read[key]


def candidates_of(
    bundles: Sequence[Bundle], against: Sequence[str], batch: int, options: BenchOptions, checkpoints: Checkpoints
) -> tuple[Candidate, ...]:
    """The bundles, then what they are held against; the baselines run what the first bundle holds."""
    found: list[Candidate] = []
    for bundle in bundles:
        found.append(_of_bundle(bundle, _free(bundle.name, found), bundle.name, batch, options, checkpoints))
    for name in against:
        found.append(_of_name(name, bundles[0], found, batch, options, checkpoints))
    return tuple(found)


def _of_bundle(
    bundle: Bundle, name: str, against: str, batch: int, options: BenchOptions, checkpoints: Checkpoints
) -> Candidate:
    runtime = usable_runtime(bundle, options.runtime)
    if reason := NOT_TIMED.get(runtime.name):
        raise NotAvailableError(f"bundle {bundle.name}: runtime {runtime.name} is not timed: {reason}")
    inputs = inputs_of(bundle, batch)
    detail = f"{runtime.name}: {runtime.availability().detail}"
    placements: list[Placement] = []

    def opened() -> Call:
        chosen = RunOptions(options.threads, options.checkpoint, options.cuda_graph, checkpoints.of)
        session = runtime.open(bundle, chosen)
        placements[:] = [place] if (place := placement_of(session)) else []
        if not options.bound:
            return lambda: session.run(inputs)
        if not isinstance(session, BindingSession):
            raise NotAvailableError(f"runtime {runtime.name} keeps no inputs on the device; leave out --bound")
        return session.bind(inputs)

    return Candidate(name, against, detail, opened, bundle, runtime.name, placements=placements)


def _of_name(
    name: str, first: Bundle, taken: Sequence[Candidate], batch: int, options: BenchOptions, checkpoints: Checkpoints
) -> Candidate:
    """Another way to run the first bundle, or another bundle; ``--bound`` is for the bundles themselves."""
    free, plain = _free(name, taken), replace(options, bound=False, cuda_graph=False)
    if name in TORCH_BASELINES:
        return _of_torch(name, free, first, batch, plain, checkpoints)
    if name.partition(":")[0] in runtime_names():
        found = _of_bundle(first, free, name, batch, replace(plain, runtime=name), checkpoints)
        return replace(found, named=True)
    place, _, runtime = name.partition("@") if not Path(name).is_dir() else (name, "", "")
    if not Path(place).is_dir():
        raise UsageError(f"--against {name!r} is none of {', '.join(BASELINES)}, nor a runtime, nor a bundle")
    other = Bundle.open(place)
    found = _of_bundle(other, free, other.name, batch, _run_alike(other, runtime, options), checkpoints)
    return replace(found, named=bool(runtime))


def _run_alike(other: Bundle, runtime: str, options: BenchOptions) -> BenchOptions:
    """``other`` as the bundles are run, in ``runtime`` if one is named; a CUDA graph where its runtime records any."""
    if not runtime and options.runtime and opens(get_runtime(options.runtime), other.manifest.format):
        runtime = options.runtime
    chosen = usable_runtime(other, runtime or None)
    graph = options.cuda_graph and records_graphs(chosen)
    return replace(options, bound=False, cuda_graph=graph, runtime=chosen.name)


def _of_torch(
    name: str, free: str, bundle: Bundle, batch: int, options: BenchOptions, checkpoints: Checkpoints
) -> Candidate:
    from mmd_export.plan import StepPlan
    from mmd_export.torch_baselines import baseline

    wanted = bundle.manifest.checkpoint
    if options.checkpoint is None and wanted.name not in BUILT_IN:
        raise UsageError(f"--against {name} needs the checkpoint {wanted.name!r}; pass --checkpoint MODEL")
    checkpoint, plan = checkpoints.of(bundle), StepPlan.from_dict(bundle.manifest.plan)
    call, runs_in = baseline(name, checkpoint, plan, inputs_of(bundle, batch), options.threads)
    return Candidate(free, name, runs_in, lambda: call)


def _free(name: str, taken: Sequence[Candidate]) -> str:
    """The last part of a path, numbered if it is taken."""
    short, names = Path(name).name or name, {candidate.name for candidate in taken}
    numbered = (short if i == 1 else f"{short} ({i})" for i in range(1, len(taken) + 2))
    return next(each for each in numbered if each not in names)
