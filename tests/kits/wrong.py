"""Bundles that are whole and wrong: every hash is right, what they hold is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle, write_bundle
from mmd_export.manifest import ManifestDraft


def with_other_sample(source: Path, out: Path, offset: float) -> Path:
    """A copy whose golden sample is off by ``offset``."""
    sample = Bundle.open(source).golden().sample
    return _rewrite(source, out, {"sample": sample + sample.dtype.type(offset)}, None)


def with_truncated_bytes(source: Path, out: Path) -> Path:
    """A copy whose golden bytes were truncated instead of rounded, so that right ones are never off by two levels."""
    (*_, last) = Bundle.open(source).golden().states
    levels = np.floor((np.clip(last.astype(np.float64), -1, 1) + 1) * 127.5)
    return _rewrite(source, out, {"sample": levels.astype(np.uint8).transpose(0, 2, 3, 1)}, None)


def with_unknown_ranges(source: Path, out: Path) -> Path:
    """A copy that does not tell what its labels may be."""
    inputs = tuple(spec.model_copy(update={"below": None}) for spec in Bundle.open(source).manifest.inputs)
    return _rewrite(source, out, {}, None, inputs=inputs)


def with_other_artefact(source: Path, out: Path, artefact: bytes) -> Path:
    """A copy whose artefact is other bytes, rightly listed."""
    return _rewrite(source, out, {}, artefact)


def _rewrite(source: Path, out: Path, arrays: dict[str, NDArray[Any]], artefact: bytes | None, **fields: Any) -> Path:
    good = Bundle.open(source)
    golden = good.golden()
    states = {f"state.{k}": np.asarray(state) for k, state in enumerate(golden.states, start=1)}
    draft = ManifestDraft(**{name: getattr(good.manifest, name) for name in ManifestDraft.model_fields} | fields)

    def write(folder: Path) -> None:
        data = good.artefact_path.read_bytes() if artefact is None else artefact
        (folder / good.manifest.artefact).write_bytes(data)

    write_bundle(out, draft, write, {**golden.inputs, **states, "sample": golden.sample} | arrays, "# wrong\n")
    return out
