"""Sizes in pixels that a network is told: their examples are pixels, their sinusoids float32 in half precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.checkpoints.families import image_size
from mmd_export.network_options import NetworkOptions
from mmd_export.onnx_translate import translate
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import FP16, HALVES
from mmd_export.precision.islands import islands
from mmd_export.precision.lower import lower, typed
from mmd_export.precision.scan import scan
from mmd_export.precision.trajectory import Calls
from mmd_export.program import export_program
from mmd_export.reference import golden_inputs
from tests.families import save_network
from tests.precisions import hand_made, run, whole

SIZED = {"sdxl": ("time_ids",), "pixart": ("resolution", "aspect_ratio")}
LARGE: dict[str, NDArray[np.float32]] = {
    "time_ids": np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32),
    "resolution": np.array([[1024, 1000]], np.float32),
    "aspect_ratio": np.array([[1.024]], np.float32),
}


def load(folder: Path, text_length: int = 4) -> Checkpoint:
    return load_checkpoint(folder, network=NetworkOptions(text_length=text_length))


def examples(checkpoint: Checkpoint, count: int = 3) -> dict[str, list[Any]]:
    return {each.name: each.examples(0, count).tolist() for each in checkpoint.conditions if each.values is not None}


# --- what golden files and ranges are told


def test_sizes_are_those_of_the_image(tmp_path: Path) -> None:
    """8x8 latents of 8 pixels each; text stays unit normal."""
    sdxl, pixart = (load(save_network(tmp_path / name, name)) for name in SIZED)
    whole_image, cropped = [64.0, 64.0, 0.0, 0.0, 64.0, 64.0], [128.0, 128.0, 16.0, 8.0, 64.0, 64.0]
    assert examples(sdxl) == {"time_ids": [whole_image, cropped, whole_image]}
    sizes, ratios = [[64.0, 64.0], [32.0, 128.0], [64.0, 64.0]], [[1.0], [0.25], [1.0]]
    assert examples(pixart) == {"resolution": sizes, "aspect_ratio": ratios}


def test_the_refiner_is_told_a_score(tmp_path: Path) -> None:
    save_network(tmp_path, "sdxl")
    (tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "text_encoder_2" / "config.json").write_text(json.dumps({"projection_dim": 18}))
    assert examples(load(tmp_path), 1) == {"time_ids": [[64.0, 64.0, 0.0, 0.0, 6.0]]}


def test_the_autoencoder_tells_how_large_the_image_is(tmp_path: Path) -> None:
    assert image_size((3, 32, 16), tmp_path, latent=False) == (32, 16)
    assert image_size((4, 32, 16), tmp_path, latent=True) == (256, 128)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8]}))
    assert image_size((4, 32, 16), tmp_path, latent=True) == (128, 64)


# --- their sinusoids in half precision


@pytest.fixture(scope="module", params=SIZED)
def calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Calls, dict[str, Any]]:
    """One float32 call of a sized network, and its inputs with sizes near 1024."""
    checkpoint = load(save_network(tmp_path_factory.mktemp("sized"), request.param))
    plan = checkpoint.plan_for(1)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, 1, checkpoint.conditions)
    constants = [[value.numpy() for value in program.constants(0)]]
    inputs = golden_inputs(checkpoint, plan, 1) | {name: LARGE[name] for name in SIZED[request.param]}
    return Calls(translate(program.step), constants, plan, checkpoint.shape, 1, checkpoint.conditions), inputs


def sinusoids(model: ir.Model, inputs: dict[str, Any]) -> list[NDArray[Any]]:
    nodes = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    return run(model, inputs, *(str(node.outputs[0].name) for node in nodes))


@pytest.mark.parametrize("precision", HALVES)
def test_sinusoids_of_a_thousand_pixels(precision: str, calls: tuple[Calls, dict[str, Any]]) -> None:
    """Of a phase in 16 bits they would be off by up to 0.2 in fp16, and in bf16 by as much as sines can be."""
    exact, inputs = calls
    said: list[str] = []
    lowered = emulated(whole(lower(exact, precision, notify=said.append)), HALVES[precision])
    expected, found = sinusoids(whole(exact), inputs), sinusoids(lowered, inputs)
    assert len(found) == len(expected) == 2 * len(SIZED["pixart" if "resolution" in inputs else "sdxl"])
    for wanted, got in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    assert "for their phase" in said[0]


def test_sinusoids_of_the_state_are_activations(tiny: Path) -> None:
    """sin(W x + sin(1000 c)): of the constant c alone it is a phase, with the product that makes it."""
    weights = {"w": np.ones((2, 2, 1, 1)), "c": np.array([0.7, 0.3]).reshape(1, 2, 1, 1), "frequency": np.array(1e3)}
    nodes: list[Any] = [
        ("Conv", ["x", "w"], "h", {}),
        ("Mul", ["c", "frequency"], "phase", {}),
        ("Sin", ["phase"], "s", {}),
        ("Add", ["h", "s"], "sum", {}),
        ("Sin", ["sum"], "y", {}),
    ]
    made = hand_made(
        nodes,
        {name: np.asarray(array, np.float32) for name, array in weights.items()},
        load_checkpoint(tiny).plan_for(1),
    )
    made = replace(made, model=typed(made.model))
    kept = islands(made.model, scan(made, 1), FP16)
    assert {node.outputs[0].name: reason for node, reason in kept.items()} == {"phase": "phase", "s": "phase"}
