"""Bundles of the Core ML target, each built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.target_options import TargetOptions
from mmd_export.targets import get_target
from tests.models import (
    save_latent_model,
    save_model,
    tiny_attention,
    tiny_checkpoint,
    tiny_labels,
    weights_of,
    write_weights,
)

__all__ = ["tiny_attention", "tiny_checkpoint", "tiny_labels"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one of ``tests.models`` with 16 channels: with 8, a palette of 64 values costs more than it saves."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", block_out_channels=(16,))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``built(model, precision, output, system, steps, decode)``: that bundle, verified by reference evaluation."""
    target = get_target("coreml")
    if not (found := target.availability()).available:
        pytest.skip(f"target coreml: {found.detail}; {found.install}")

    @cache
    def make(
        model: Path,
        precision: str = "fp32",
        output: str = "float32",
        system: str | None = None,
        steps: int = 1,
        decode: bool = False,
    ) -> Bundle:
        out = tmp_path_factory.mktemp("coreml") / "bundle"
        options = BuildOptions(
            str(model), "coreml", out, precision, output=output, decode=decode, steps=steps,
            of_target=TargetOptions(deployment_target=system),
        )  # fmt: skip
        return build(options)

    return make


@pytest.fixture(scope="session")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent model with its autoencoder."""
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


@pytest.fixture(scope="session")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of some thousands, finite in half precision, their squares not."""
    folder = save_model(tmp_path_factory.mktemp("models") / "wild")
    weights = weights_of(folder)
    for name in ("conv_in.weight", "conv_in.bias"):
        weights[name] = weights[name] * 4000
    write_weights(folder, weights)
    return folder
