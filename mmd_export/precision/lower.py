"""One network call in the precision that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common as passes

from mmd_export.errors import UsageError
from mmd_export.precision.formats import GRIDS, HALVES, require_ranges
from mmd_export.precision.half import to_half
from mmd_export.precision.islands import ends, islands, promoted
from mmd_export.precision.quantise import Recipe, quantise
from mmd_export.precision.scan import scan
from mmd_export.precision.trajectory import Calls
from mmd_export.tuned_precision import QUANTISATION_FILE, TunedPrecision

SCANNED = 4  # images, for 16 bits: maxima, with headroom for the others
CALIBRATED = 32  # images, for ranges without headroom


def lower(
    calls: Calls,
    precision: str,
    images: int | None = None,
    recipe: Recipe | None = None,
    notify: Callable[[str], None] = lambda _: None,
    tuned: TunedPrecision | None = None,
    float32: frozenset[str] = frozenset(),
) -> Calls:
    """``calls`` in ``precision``, a new model; ``images``: how many trajectories to look at, None for the default.

    Ranges that it was ``tuned`` with are taken as they are, if it was tuned in this precision. ``float32``: values
    whose operators stay as they are.

    Raises UsageError for images where no range is needed, and for a trajectory that is not finite.
    """
    require_ranges(precision, images)
    if precision == "fp32":
        return calls
    lowered = Calls(typed(calls.model), calls.constants, calls.plan, calls.shape, calls.batch, calls.conditions)
    if precision in HALVES:
        half = HALVES[precision]
        seen = scan(lowered, images or SCANNED)
        kept = ends(lowered.model) | islands(lowered.model, seen, half) | promoted(lowered.model, float32)
        counts = ", ".join(f"{count} for their {reason}" for reason, count in sorted(Counter(kept.values()).items()))
        nodes = sum(1 for _ in lowered.model.graph)
        notify(f"{precision}: {len(kept)} of {nodes} operations of a call stay float32 ({counts or 'none'})")
        lowered = to_half(lowered, kept, half)
    else:
        grid, chosen = GRIDS[precision], recipe or Recipe()
        ranges = tuned if tuned is not None and tuned.precision == precision and grid.activations else None
        if ranges is not None:
            _require_tuned_form(chosen, images)
            notify(f"{precision}: the ranges are those that it was tuned with ({QUANTISATION_FILE})")
        lowered = quantise(lowered, grid, chosen, images or CALIBRATED, ranges, float32)
    passes.RemoveUnusedNodesPass()(lowered.model)
    return lowered


def _require_tuned_form(recipe: Recipe, images: int | None) -> None:
    """Raise UsageError for options that ask for other ranges than those on record."""
    if images is not None:
        raise UsageError(f"--calibration is {images}, but the model was tuned with ranges of its own; leave it out")
    if not recipe.per_step:
        raise UsageError("the model was tuned with a range for each step, a loop has one for all; use --form unrolled")


def typed(model: ir.Model) -> ir.Model:
    """A copy in which every value has its type: what a rewrite made has none."""
    copy = model.clone()
    return passes.ShapeInferencePass(strict_mode=False)(copy).model
