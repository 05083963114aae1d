"""``mmd-export report``: gather what was measured, measure the rest, write one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle
from mmd_export.commands.bench import bench
from mmd_export.commands.candidates import NOT_TIMED, BenchOptions
from mmd_export.commands.cards import write_numbers
from mmd_export.commands.verify import usable_runtime, verify
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.folders import read_object, write_text
from mmd_export.numbers import measured_as
from mmd_export.parity import chunks
from mmd_export.report.model import BundleFacts
from mmd_export.runtime import RunOptions


@dataclass(frozen=True)
class ReportOptions:
    """``verify``, ``bench``: JSON files to read instead of measuring. ``seconds`` 0: no latency is measured."""

    bundles: tuple[Path, ...]
    out: Path
    verify: tuple[Path, ...] = ()
    bench: Path | None = None
    runtime: str | None = None
    checkpoint: str | None = None
    seconds: float = 10.0
    update_card: bool = False


def report(options: ReportOptions, notify: Callable[[str], None] = lambda _: None) -> None:
    """Write the page. A damaged bundle is refused before anything is measured; a failed parity is on the page."""
    from mmd_export.report.page import render

    bundles = [Bundle.open(path) for path in options.bundles]
    verified = _verified(bundles, options)
    timed = {} if options.bench is None else _read(options.bench, "--bench", "summary")
    facts = [_facts(bundle, verified.get(bundle.artefact_sha256), options, notify) for bundle in bundles]
    if options.bench is None and options.seconds > 0:
        timed = _timed(bundles, options, notify)
    _require_measured(bundles, timed, options)
    write_text(options.out, render(facts, timed), "--out")
    if options.update_card:
        for path, each in zip(options.bundles, facts, strict=True):
            known = measured_as(each.bundle.artefact_sha256, timed) is not None
            write_numbers(path, each.verify, timed if known else {})


def _verified(bundles: Sequence[Bundle], options: ReportOptions) -> dict[str, Mapping[str, Any]]:
    """The JSON of ``verify`` by the hash of its artefact: bundles of several precisions have one name."""
    known = {bundle.artefact_sha256: bundle.name for bundle in bundles}
    found: dict[str, Mapping[str, Any]] = {}
    for path in options.verify:
        data = _read(path, "--verify", "rungs")
        if (digest := str(data.get("artefact_sha256"))) not in known:
            told = ", ".join(f"{name} ({sha[:12]})" for sha, name in known.items())
            raise UsageError(
                f"--verify {path} is of bundle {data.get('bundle')!r} ({digest[:12]}), the report is of {told}"
            )
        found[digest] = data
    return found


def _read(path: Path, flag: str, key: str) -> dict[str, Any]:
    advice = f"give what mmd-export {flag[2:]} --json wrote"
    data = read_object(path, flag, advice)
    if key not in data:
        raise UsageError(f"{flag} {path} has no {key!r}; {advice}")
    return data


def _facts(
    bundle: Bundle, verified: Mapping[str, Any] | None, options: ReportOptions, notify: Callable[[str], None]
) -> BundleFacts:
    """Verified now if it was not before; where it cannot run here, the page says so."""
    try:
        runtime = usable_runtime(bundle, options.runtime)
        if verified is None:
            notify(f"verifying {bundle.name}")
            verified = verify(bundle, options.runtime, options.checkpoint, notify).to_dict()
        session = runtime.open(bundle, RunOptions(checkpoint=options.checkpoint))
        sample: NDArray[Any] = np.concatenate([session.run(inputs)["sample"] for inputs, _ in chunks(bundle)])
    except NotAvailableError as error:
        return BundleFacts(bundle, verified or {}, None, f"the artefact does not run here: {error}")
    return BundleFacts(bundle, verified, sample)


def _timed(bundles: Sequence[Bundle], options: ReportOptions, notify: Callable[[str], None]) -> dict[str, Any]:
    """All bundles that run here and can be timed, in one interleaved run."""
    able = []
    for bundle, path in zip(bundles, options.bundles, strict=True):
        try:
            if usable_runtime(bundle, options.runtime).name not in NOT_TIMED:
                able.append(path)
        except NotAvailableError as error:
            notify(f"{bundle.name} is not timed: {error}")
    if not able:
        return {}
    asked = BenchOptions(
        tuple(able), (), options.runtime, options.checkpoint, seconds=options.seconds, threads=0, cold=1
    )
    return bench(asked, notify).to_dict()


def _require_measured(bundles: Sequence[Bundle], timed: Mapping[str, Any], options: ReportOptions) -> None:
    """Raise UsageError if a bench file is of other bundles."""
    if options.bench is None:
        return
    if not any(measured_as(bundle.artefact_sha256, timed) for bundle in bundles):
        measured = ", ".join(f"{name} ({sha[:12]})" for name, sha in timed.get("artefacts", {}).items())
        told = ", ".join(f"{bundle.name} ({bundle.artefact_sha256[:12]})" for bundle in bundles)
        raise UsageError(f"--bench {options.bench} measured {measured or 'no bundle'}, the report is of {told}")
