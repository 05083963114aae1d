"""A small bundle for the tests: two steps of nothing, in four files and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmd_export.bundle import (
    BatchSpec,
    Bundle,
    CheckpointRef,
    GraphInfo,
    ManifestDraft,
    TensorSpec,
    Tolerance,
    write_bundle,
)

ROOT = Path(__file__).parents[2]
CARD = "# digits-2\n\nTwo steps.\n"
SHAPE = (1, 1, 2, 2)


def draft(**changes: Any) -> ManifestDraft:
    fields: dict[str, Any] = {
        "name": "digits-2",
        "target": "onnx",
        "format": "onnx",
        "artefact": "model.onnx",
        "precision": "fp32",
        "plan": {"solver": "ddim", "steps": [{"timestep": 999.0}, {"timestep": 499.0}], "clip": None},
        "inputs": (TensorSpec(name="noise", dtype="float32", shape=SHAPE),),
        "outputs": (TensorSpec(name="sample", dtype="float32", shape=SHAPE),),
        "batch": BatchSpec(sizes=(1,)),
        "checkpoint": CheckpointRef(name="digits", sha256="0" * 64, licence="CC-BY-4.0"),
        "toolchain": {"torch": "2.13.0", "onnx": "1.23.2"},
        "tolerance": Tolerance(atol=1e-4, reason="measured 3e-6 on 8 noises, see https://example.org/a/b"),
        "graph": GraphInfo(nodes=12, unique_weight_bytes=64, op_counts={"Conv": 4, "Add": 8}),
    }
    return ManifestDraft(**(fields | changes))


def golden(count: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    noise = np.linspace(-2, 2, count * 4, dtype=np.float32).reshape(count, 1, 2, 2)
    return {"noise": noise, "state.1": noise / 2, "state.2": noise / 4, "sample": np.clip(noise / 4, -1, 1)}


def artefact(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 2)
    (folder / "model.onnx_data").write_bytes(b"weights" * 40)


def make(out: Path, **options: Any) -> Bundle:
    drafted, tensors = options.pop("draft", draft()), options.pop("golden", golden())
    return write_bundle(out, drafted, artefact, tensors, CARD, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_beside(out: Path) -> list[str]:
    return sorted(entry.name for entry in out.parent.iterdir() if entry.name != out.name)


UNDRAWN = ("a latent", "states of a text")


def undrawn(folder: Path, what: str) -> Bundle:
    """A bundle of one of ``UNDRAWN``, of which a command that is told a seed and a class makes no picture."""
    few = golden()
    if what == "a latent":
        few = {name: np.repeat(value, 4, axis=1) for name, value in few.items()}
        noise, sample = (TensorSpec(name=name, dtype="float32", shape=(1, 4, 2, 2)) for name in ("noise", "sample"))
        return make(folder, draft=draft(inputs=(noise,), outputs=(sample,)), golden=few)
    few["encoder_hidden_states"] = np.zeros((len(few["noise"]), 2, 8), np.float32)
    states = TensorSpec(name="encoder_hidden_states", dtype="float32", shape=(1, 2, 8))
    return make(folder, draft=draft(inputs=(*draft().inputs, states)), golden=few)
