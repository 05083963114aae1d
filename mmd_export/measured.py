"""Rung 6 of a bundle before it is published, for whoever makes one: ``build`` and ``finalize``. No torch."""

from __future__ import annotations

from pathlib import Path

from mmd_export.bundle import Bundle, Measured
from mmd_export.card import model_card
from mmd_export.errors import MmdExportError, NotAvailableError
from mmd_export.parity import ParityReport, check_artefact
from mmd_export.runtime import RunOptions, Runtime


def log_beside(out: Path) -> Path:
    """Where a compiler's log goes when it fails."""
    return out.with_name(f"{out.name}.log")


def measured(bundle: Bundle, runtime: Runtime, note: str = "") -> Measured:
    """Rung 6 on the finished bundle; raises ParityError, and says in the card if there is nothing to run it on.

    ``note`` goes into the card too.
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
    ParityReport(bundle.name, runtime.name, (rung,)).require()
    parity = {comparison.name: rounded_up(comparison.max_abs) for comparison in rung.comparisons}
    draft = bundle.manifest.model_copy(update={"parity": parity})
    unseen = f"; states not seen: {rung.unseen}" if rung.unseen else ""
    return Measured(model_card(draft, f"runtime {runtime.name}, {found.detail}{unseen}{note}"), parity)


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
