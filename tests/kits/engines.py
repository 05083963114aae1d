"""Bundles of format tensorrt whose engine is text for the stand-in of TensorRT in ``tensorrt/``."""

from __future__ import annotations

from pathlib import Path

from mmd_export.bundle import BatchSpec, TensorSpec, write_bundle
from mmd_export.trt.lock import LockFacts
from tests.export.bundles import CARD, draft, golden


def engine_bundle(out: Path, engine: str, *sizes: int, version_compat: bool = False, graph: bool = False) -> Path:
    """Batches of ``sizes``, each with a profile. ``graph``: beside the engine, as where its weights were stripped."""
    facts = LockFacts(
        "tensorrt", "10.13.2.6", "linux-x86_64", "8.9", "0" * 64, version_compat="yes" if version_compat else "no"
    )
    changed = draft(
        target="tensorrt", format="tensorrt", artefact="model.plan", hardware=facts.to_dict(),
        batch=BatchSpec(sizes=sizes),
        inputs=(TensorSpec(name="noise", dtype="float32", shape=("batch", 1, 2, 2)),),
        outputs=(TensorSpec(name="sample", dtype="float32", shape=("batch", 1, 2, 2)),),
    )  # fmt: skip

    def write(folder: Path) -> None:
        (folder / "model.plan").write_text(engine)
        if graph:
            (folder / "model.onnx").write_bytes(b"weights")

    write_bundle(out, changed, write, golden(), CARD)
    return out
