"""Reference evaluation of ``.mlpackage`` artefacts on any machine: the saved bytes under the documented meaning of ops.

It is not Core ML: it shows that the converter wrote what was meant, not what Apple's kernels make of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import BundleError, NotAvailableError, UsageError
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session
from mmd_runtime.chunks import check_array, check_inputs
from mmd_runtime.mil.evaluate import Evaluator, UnknownOpError
from mmd_runtime.mil.program import Program, read_package
from mmd_runtime.mil.wire import MalformedError

_DTYPES = {"fp32": "float32", "int32": "int64"}  # of an input: as Core ML says it, as the manifest does
_OUTPUTS = {"fp32": "float32", "rgb": "uint8", "grayscale": "uint8"}


class CoreMLReferenceRuntime:
    """Opens ``mlpackage`` bundles with numpy alone."""

    name = "coreml-reference"
    formats: tuple[str, ...] = ("mlpackage",)
    modules: tuple[str, ...] = ()
    unseen = ""

    def availability(self) -> Availability:
        """Everywhere."""
        return Availability(True, f"reference evaluation by numpy {np.__version__}, not Core ML")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:  # noqa: ARG002 - numpy chooses its threads
        return _Session(bundle)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:  # noqa: ARG002 - as above
        return _Session(bundle)


class _Session:
    """One package read from disk."""

    whole = True

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._steps = bundle.golden().steps
        try:
            self._evaluator = Evaluator(read_package(bundle.artefact_path))
        except MalformedError as error:
            raise _broken(bundle, error) from error
        except UnknownOpError as error:
            raise NotAvailableError(
                f"bundle {bundle.name}: reference evaluation has no rule for it: {error}; verify it on macOS"
            ) from error
        _require_interface(bundle, self._evaluator.program)
        self._states = [self._state_value(k) for k in range(1, self._steps + 1)]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """The sample of one batch."""
        check_inputs(self._bundle, inputs)
        (sample,) = self._evaluate(inputs, self._evaluator.program.outputs).values()
        return {"sample": self._as_declared(sample)}

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        """``state.1`` ... ``state.K`` and the sample, from one pass."""
        check_inputs(self._bundle, inputs)
        (sample,) = self._evaluator.program.outputs
        found = self._evaluate(inputs, [*self._states, sample])
        states = {f"state.{k}": found[name] for k, name in enumerate(self._states, start=1)}
        return states | {"sample": self._as_declared(found[sample])}

    def run_step(self, step: int, known: Arrays) -> Array:
        """``state.<step>`` from the states before it, or from ``noise``."""
        name = self._bundle.name
        if not 1 <= step <= self._steps:
            raise UsageError(f"bundle {name}: step {step} is asked for; it has steps 1 to {self._steps}")
        specs = {spec.name: spec for spec in self._bundle.manifest.inputs}
        before = {f"state.{k}": self._states[k - 1] for k in range(1, step)}
        specs |= {state: specs["noise"].model_copy(update={"name": state}) for state in before}
        if missing := [each for each in specs if each not in known]:
            raise UsageError(f"bundle {name}: step {step} starts from '{missing[0]}', given: {sorted(known)}; add it")
        for each, spec in specs.items():
            check_array(self._bundle, known[each], spec)
        feeds = {before.get(each, each): known[each] for each in specs}
        goal = self._states[step - 1]
        return self._evaluate(feeds, [goal])[goal]

    def _evaluate(self, feeds: Arrays, goals: Any) -> dict[str, Array]:
        given = {key: array.astype(np.int32) if array.dtype == np.int64 else array for key, array in feeds.items()}
        try:
            return self._evaluator.run(given, goals)
        except MalformedError as error:
            raise _broken(self._bundle, error) from error

    def _as_declared(self, sample: Array) -> Array:
        """An image output holds what the graph gives as bytes, channels last: rounded and kept within 0 to 255."""
        if self._bundle.manifest.spec("sample").dtype != "uint8":
            return sample
        levels = np.clip(np.rint(sample.astype(np.float32)), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))

    def _state_value(self, k: int) -> str:
        """The value of ``state.<k>``; a last state that is not clamped is the sample itself."""
        program, name = self._evaluator.program, f"state_{k}"
        if k == self._steps and name not in self._evaluator.producer and self._bundle.gives_latents:
            name = program.outputs[0]
        wanted = self._bundle.manifest.spec("noise").shape
        found = self._evaluator.types.get(name)
        if found is None or found.dtype != "fp32" or found.shape != wanted:
            says = "no such value" if found is None else str(found)
            reason = MalformedError(f"'{name}', the state after step {k}, is {says}, not fp32 {wanted}")
            raise _broken(self._bundle, reason)
        return name


def _require_interface(bundle: Bundle, program: Program) -> None:
    """Inputs and outputs are those of the manifest, in the function and in the description that an app reads."""
    kinds = {feature.name: feature.kind for feature in program.features}
    found = {name: (_DTYPES.get(kinds.get(name, "")), declared.shape) for name, declared in program.inputs.items()}
    says = {spec.name: (spec.dtype, spec.shape) for spec in bundle.manifest.inputs}
    if found != says:
        raise _broken(bundle, MalformedError(f"it takes {found}, the manifest says {says}"))
    sample = bundle.manifest.spec("sample")
    if program.outputs != ("sample",) or _OUTPUTS.get(kinds.get("sample", "")) != sample.dtype:
        given = {name: kinds.get(name) for name in program.outputs}
        raise _broken(bundle, MalformedError(f"it gives {given}, the manifest says 'sample' {sample.dtype}"))
    shapes = {spec.name: tuple(int(size) for size in spec.shape) for spec in (*bundle.manifest.inputs, sample)}
    if unknown := kinds.keys() - shapes.keys():
        raise _broken(bundle, MalformedError(f"it describes {sorted(unknown)}, which the manifest does not have"))
    for feature in program.features:
        expected = shapes[feature.name][1:3] if feature.kind in ("rgb", "grayscale") else shapes[feature.name]
        if feature.shape != expected and (feature.shape or feature.name != "sample"):
            described = f"it describes {feature.name!r} as {feature.kind} {feature.shape}"
            raise _broken(bundle, MalformedError(f"{described}, the manifest says {expected}"))


def _broken(bundle: Bundle, error: MalformedError) -> BundleError:
    artefact = bundle.manifest.artefact
    return BundleError(f"bundle {bundle.name}: {artefact} cannot be evaluated: {error}; rebuild the bundle")


RUNTIME = CoreMLReferenceRuntime()
