"""Rung 6 of a bundle before it is published, for whoever makes one: ``build`` and ``finalize``. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmd_export.bundle import Bundle, ManifestDraft, Measured
from mmd_export.card import model_card
from mmd_export.comparison import NO_LIMITS
from mmd_export.errors import MmdExportError, NotAvailableError
from mmd_export.parity import ParityReport, Rung, check_artefact
from mmd_export.runtime import RunOptions, Runtime
from mmd_export.tolerance import mean_tolerance, on_a_device

MEASURED_IN = ("onnxruntime", "onnxruntime:cpu")  # which set the tolerances of target onnx


def log_beside(out: Path) -> Path:
    """Where a compiler's log goes when it fails."""
    return out.with_name(f"{out.name}.log")


def measured(bundle: Bundle, runtime: Runtime, note: str = "", moves: str = "") -> Measured:
    """Rung 6 on the finished bundle; raises ParityError, and says in the card if there is nothing to run it on.

    ``note`` goes into the card too; ``moves``: what a failure advises.
    """
    if not (found := runtime.availability()).available:
        return _unverified(bundle, f"runtime {runtime.name}: {found.detail}")
    try:
        rung = check_artefact(bundle, runtime, RunOptions())
    except NotAvailableError as error:  # the runtime is here, but it cannot run this artefact, such as one of bf16
        return _unverified(bundle, str(error))
    except MmdExportError as error:
        if type(error) is not MmdExportError:
            raise
        target = bundle.manifest.target
        raise NotAvailableError(f"target {target} made what its runtime cannot run: {error}; try another") from error
    told = device_advice(bundle.manifest, runtime.name, rung)
    ParityReport(bundle.name, runtime.name, (rung,), advice="; ".join(filter(None, (told, moves)))).require()
    parity = {comparison.name: rounded_up(comparison.max_abs) for comparison in rung.comparisons}
    draft = bundle.manifest.model_copy(update={"parity": parity})
    unseen = f"; states not seen: {rung.unseen}" if rung.unseen else ""
    return Measured(model_card(draft, f"runtime {runtime.name}, {found.detail}{unseen}{note}"), parity)


def device_advice(manifest: ManifestDraft, runtime: str, rung: Rung) -> str:
    """The next move where a device breaks the tolerance by no more than one that rounds every result may.

    On average too: with ``--atol`` nothing else would tell rounding from another picture.
    """
    wider = on_a_device(manifest.target, manifest.precision)
    if rung.passed or rung.limits != NO_LIMITS or wider is None or runtime in MEASURED_IN:
        return ""
    if not replace(rung, atol=wider.atol, mean=mean_tolerance(wider.atol)).passed:
        return ""
    worst = max(measurement.value for measurement in wider.measured)
    return (
        f"a device that rounds every result of {manifest.precision} may be off by {worst:.2g}; "
        f"if {runtime} is one, verify --atol {wider.atol:g} allows it"
    )


def _unverified(bundle: Bundle, reason: str) -> Measured:
    return Measured(model_card(bundle.manifest, f"not verified: {reason}"), unverified=reason)


def rounded_up(error: float) -> float:
    """``error`` to one significant digit, upwards: a bound that does not change with the thread count of a machine."""
    if error == 0.0:
        return 0.0
    text = f"{error:.0e}"
    bound = float(text)
    exponent = int(text.split("e")[1])
    return bound if bound >= error else float(f"{round(bound / 10.0**exponent) + 1}e{exponent}")
