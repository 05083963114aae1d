"""Bundles of the Core ML target, each built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.target_options import TargetOptions
from mmd_export.targets import get_target
from tests.models import save_model, tiny, tiny_attention, tiny_checkpoint, tiny_labels, weights_of, write_weights

__all__ = ["tiny", "tiny_attention", "tiny_checkpoint", "tiny_labels"]
STEPS = 2


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``built(model, precision=..., output=..., system=...)``: that bundle, verified by reference evaluation."""
    target = get_target("coreml")
    if not (found := target.availability()).available:
        pytest.skip(f"target coreml: {found.detail}; {found.install}")

    @cache
    def make(model: Path, precision: str = "fp32", output: str = "float32", system: str | None = None) -> Bundle:
        out = tmp_path_factory.mktemp("coreml") / "bundle"
        of_target = TargetOptions(deployment_target=system)
        options: dict[str, Any] = {"precision": precision, "output": output, "of_target": of_target, "steps": STEPS}
        return build(BuildOptions(model=str(model), target="coreml", out=out, **options))

    return make


@pytest.fixture(scope="session")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of some thousands, finite in half precision, their squares not."""
    folder = save_model(tmp_path_factory.mktemp("models") / "wild")
    weights = weights_of(folder)
    for name in ("conv_in.weight", "conv_in.bias"):
        weights[name] = weights[name] * 4000
    write_weights(folder, weights)
    return folder
