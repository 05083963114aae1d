"""The real trajectory of a sampler in float32: the call in onnxruntime, free-running through the plan, and watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.chain import Images, run_plan
from mmd_export.conditions import Condition
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.folders import scratch_folder
from mmd_export.noise import sampler_noise
from mmd_export.plan import StepPlan

# Images that no other seed of the project draws: neither the golden file's nor those of a report.
SEED = 20230117
_ROWS = 8  # at once, where the batch is free
Rows: TypeAlias = list[list[NDArray[Any]]]
Watch: TypeAlias = Callable[[int, Mapping[str, NDArray[Any]]], None]


@dataclass(frozen=True)
class Calls:
    """A call with all that its K uses need.

    ``model`` maps (x, *conditions, *constants) to the raw output; ``constants[k]`` are those of call k; ``batch`` is
    None where it is free.
    """

    model: ir.Model
    constants: Rows
    plan: StepPlan
    shape: tuple[int, int, int]
    batch: int | None
    conditions: tuple[Condition, ...] = ()

    @property
    def constant_inputs(self) -> Sequence[ir.Value]:
        """The inputs that differ from call to call and not from image to image."""
        return self.model.graph.inputs[1 + len(self.conditions) :]


def follow(calls: Calls, watched: ir.Model, images: int, watch: Watch) -> None:
    """Sample ``images`` images with ``watched``, the call with further outputs; ``watch(k, them)`` sees each call.

    Raises UsageError at the first state that is not finite.
    """
    with scratch_folder() as folder:
        session = open_model(watched, folder)
        first = 0
        while first < images:
            rows = calls.batch or min(_ROWS, images - first)
            _follow(calls, session, first, rows, watch)
            first += rows


def _follow(calls: Calls, session: Any, first: int, rows: int, watch: Watch) -> None:
    """One batch; ``first`` is the index of its first image."""
    names = [value.name for value in session.get_inputs()]
    inputs = sampler_noise(SEED, rows, calls.shape, calls.plan.noisy_steps, first=first)
    told = [each.examples(SEED + i, first + rows)[first:] for i, each in enumerate(calls.conditions, start=1)]

    def network(k: int, x: Images) -> Images:
        feeds = dict(zip(names, [x, *told, *calls.constants[k]], strict=True))
        output, *more = session.run(None, feeds)
        watch(k, dict(zip([value.name for value in session.get_outputs()[1:]], more, strict=True)))
        found: Images = output
        return found

    for k, state in enumerate(run_plan(calls.plan, inputs, network), start=1):
        if not np.isfinite(state).all():
            raise UsageError(
                f"the float32 sampler itself gives NaN or infinity at step {k} of {calls.plan.step_count}, "
                f"so it has no ranges; check the weights"
            )


def open_model(model: ir.Model, folder: Path) -> Any:
    """A session on one thread: the ranges, and so the bytes, do not depend on how sums are split between threads."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise NotAvailableError(
            f"the ranges of a lower precision need onnxruntime ({error}); pip install 'mmd-export[onnx]'"
        ) from error
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    path = folder / "call.onnx"
    ir.save(model, path, external_data="call.data")  # a call may be larger than one protobuf message
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
