"""Guidance in the network: the formula, its two forms, the embedded scale, and the hash that covers what was chosen."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint, load_matching
from mmd_export.checkpoints.classifier_free import FASTER
from mmd_export.commands.verify import verify
from mmd_export.conditions import names_of
from mmd_export.errors import UsageError
from mmd_export.guidance import GuidedDenoiser, guidance_embedding
from mmd_export.manifest import CheckpointRef
from mmd_export.network_options import NetworkOptions
from tests.families import save_network
from tests.models import save_latent_model

ROOT = Path(__file__).parents[2]
FORMS = ("doubled", "two-calls")


class Told(nn.Module):
    """A network whose output says what it was told, and how often it was called."""

    calls = 0

    def forward(self, x: Tensor, timestep: Tensor, **told: Tensor) -> Tensor:
        self.calls += 1
        total = sum(value.flatten(1).sum(1) if value.dim() > 1 else value for value in told.values())
        return x * total.reshape(-1, 1, 1, 1) + timestep  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
def test_the_formula(form: str) -> None:
    """By hand: a null class, an input in the place of another, and a condition that both sides share."""
    network = Told()
    guided = GuidedDenoiser(network, 2.5, {"label": 9, "text": "negative"}, form)
    x = torch.full((3, 1, 1, 1), 2.0)
    told = {
        "label": torch.tensor([1, 2, 3]),
        "text": torch.tensor([[1.0, 1.0], [0.0, 4.0], [2.0, 2.0]]),
        "size": torch.tensor([5.0, 6.0, 7.0]),
    }
    negative = torch.tensor([[0.5, 0.0], [0.0, 0.25], [1.0, 0.0]])
    found = guided(x, torch.tensor([10]), **told, negative=negative).flatten()
    cond = 2.0 * torch.tensor([1 + 2 + 5.0, 2 + 4 + 6.0, 3 + 4 + 7.0]) + 10
    uncond = 2.0 * torch.tensor([9 + 0.5 + 5.0, 9 + 0.25 + 6.0, 9 + 1.0 + 7.0]) + 10
    assert torch.equal(found, uncond + 2.5 * (cond - uncond))
    assert network.calls == (1 if form == "doubled" else 2)


@pytest.mark.parametrize(("scale", "width"), [(8.5, 256), (1.0, 16), (3.25, 7)])
def test_the_embedded_scale_is_that_of_diffusers(scale: float, width: int) -> None:
    """get_guidance_scale_embedding of its LCM pipeline is the embedding of timestep 1000 w with these settings."""
    from diffusers.models.embeddings import get_timestep_embedding

    theirs = get_timestep_embedding(
        torch.tensor([1000.0 * (scale - 1.0)]), width, flip_sin_to_cos=False, downscale_freq_shift=1
    )
    ours = torch.tensor([guidance_embedding(scale, width)], dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-6 * max(1.0, 1000 * (scale - 1))  # its angles are float32
    half = width // 2
    assert math.isclose(float((ours[0, : 2 * half] ** 2).sum()), half)


def test_the_embedded_scale_reaches_the_network(tmp_path: Path) -> None:
    """Against diffusers' call with timestep_cond; no second call, no further input; the default is LCM's 8.5."""
    save_network(tmp_path, "lcm")
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    for scale in (None, 2.0):
        checkpoint = load_checkpoint(tmp_path, network=NetworkOptions(scale, text_length=6))
        assert names_of(checkpoint.conditions) == ("encoder_hidden_states",)
        network = checkpoint.denoiser.network
        assert isinstance(network, nn.Module)
        cond = torch.tensor([guidance_embedding(8.5 if scale is None else scale, 16)], dtype=torch.float32)
        with torch.inference_mode():
            expected = network(x, t, text, timestep_cond=cond).sample
            found = checkpoint.denoiser(x, t, encoder_hidden_states=text)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert any("scale 8.5 is embedded" in warning for warning in checkpoint.warnings) == (scale is None)


# --- what a bundle keeps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("guided") / "dit", "dit")


@pytest.fixture(scope="module")
def bundles(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    out = tmp_path_factory.mktemp("bundles")
    made = {}
    for form in FORMS:
        network = NetworkOptions(4.0, form)
        made[form] = build(BuildOptions(str(model), "onnx", out / form, steps=2, batch="2", network=network))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_every_rung_with_the_network_of_the_bundle(form: str, model: Path, bundles: dict[str, Bundle]) -> None:
    """verify and the torch runtime make the guided network again, from the plain folder and the manifest."""
    bundle = bundles[form]
    assert bundle.manifest.checkpoint.options == {"guidance_scale": 4.0, "guidance_form": form, "null_label": 7}
    report = verify(bundle, checkpoint=str(model))
    report.require()
    assert [rung.verdict for rung in report.rungs][2:] == ["passed"] * 4
    assert verify(bundle, "torch", str(model)).rungs[-1].passed


def test_both_forms_are_one_function(bundles: dict[str, Bundle]) -> None:
    doubled, two_calls = (bundles[form] for form in FORMS)
    np.testing.assert_allclose(doubled.golden().sample, two_calls.golden().sample, rtol=0, atol=1e-6)
    sizes = [bundle.manifest.graph.unique_weight_bytes for bundle in (doubled, two_calls)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]  # weights once, however many calls
    assert two_calls.manifest.graph.nodes > 1.5 * doubled.manifest.graph.nodes


def test_another_scale_is_another_checkpoint(model: Path, bundles: dict[str, Bundle]) -> None:
    hashes = {load_checkpoint(model, network=NetworkOptions(scale)).sha256 for scale in (None, 2.0, 4.0)}
    assert len(hashes) == 3
    assert load_checkpoint(model, network=NetworkOptions(1.0)).sha256 == load_checkpoint(model).sha256
    wanted = bundles["doubled"].manifest.checkpoint
    assert load_matching(str(model), wanted).sha256 == wanted.sha256
    with pytest.raises(UsageError, match="has hash"):
        load_matching(str(model), wanted.model_copy(update={"options": {**wanted.options, "guidance_scale": 5.0}}))


@pytest.mark.parametrize("decode", [False, True])
def test_guidance_and_a_decoder(decode: bool, tmp_path: Path) -> None:
    """Both in one graph; the hash of the bundle covers the guidance whether the decoder is in it or not."""
    save_latent_model(tmp_path / "latent")
    shutil.rmtree(tmp_path / "latent" / "unet")
    save_network(tmp_path / "latent", "dit")
    network = NetworkOptions(3.0)
    options = BuildOptions(
        str(tmp_path / "latent"), "onnx", tmp_path / "b", steps=2, batch="2", decode=decode, network=network
    )
    bundle = build(options)
    report = verify(bundle, checkpoint=str(tmp_path / "latent"))
    report.require()
    assert [rung.verdict for rung in report.rungs][2:] == ["passed"] * 4
    both = load_checkpoint(tmp_path / "latent", network=network)
    assert bundle.manifest.checkpoint.sha256 == (both.sha256 if decode else both.network_sha256)
    assert bundle.manifest.checkpoint.sha256 != load_checkpoint(tmp_path / "latent").network_sha256
    assert bundle.manifest.spec("sample").shape[1] == (3 if decode else 4)


def test_a_manifest_without_options_is_as_it_was() -> None:
    plain = CheckpointRef(name="digits", sha256="0" * 64)
    assert json.loads(plain.model_dump_json()) == {"name": "digits", "sha256": "0" * 64, "licence": None}
    guided = CheckpointRef(name="d", sha256="0" * 64, options={"guidance_scale": 2.5, "null_label": 3})
    assert CheckpointRef.model_validate(guided.model_dump()) == guided
    assert json.loads(guided.model_dump_json())["options"] == {"guidance_scale": 2.5, "null_label": 3}


def test_auto_is_what_was_measured_faster_on_the_largest_network() -> None:
    rows = json.loads((ROOT / "benchmarks/results/guidance.json").read_text())["rows"]
    largest = max(row["parameters"] for row in rows)
    rows = [row for row in rows if row["parameters"] == largest]
    mean = math.prod(row["doubled_over_two_calls"]["median"] for row in rows) ** (1 / len(rows))
    assert ("two-calls" if mean > 1 else "doubled") == FASTER


# --- refused


@pytest.mark.parametrize(
    ("fixture", "options", "message"),
    [
        ("tiny", {"guidance_scale": 2.0}, r"--guidance-scale is 2.0, but the model is unconditional"),
        ("tiny", {"guidance_form": "doubled"}, r"--guidance-form doubled has no meaning"),
        ("tiny_labels", {"guidance_scale": 2.0}, r"nothing says what stands for no class_labels; pass --null-label N"),
        ("tiny_labels", {"guidance_scale": 2.0, "null_label": 5}, r"--null-label is 5; the model knows 0 to 4"),
        ("tiny_labels", {"null_label": 4}, r"--null-label 4 has no meaning, there is no --guidance-scale but 1"),
    ],
)
def test_guidance_that_cannot_be(
    fixture: str, options: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UsageError, match=message):
        load_checkpoint(request.getfixturevalue(fixture), network=NetworkOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": math.inf}, r"--guidance-scale is inf; it must be finite"),
        ({"guidance_form": "both"}, r"--guidance-form 'both' is unknown; known: auto, doubled, two-calls"),
        ({"text_length": 0}, r"--text-length is 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NetworkOptions(**options)


def test_options_of_another_version() -> None:
    with pytest.raises(UsageError, match=r"network option 'gidance' is unknown; known: guidance_form"):
        NetworkOptions.from_dict({"gidance": 2.0})


def test_a_null_label_of_ones_own(tiny_labels: Path) -> None:
    plain = load_checkpoint(tiny_labels)
    guided = load_checkpoint(tiny_labels, network=NetworkOptions(3.0, null_label=4))
    x, t = torch.randn(2, *plain.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    labels = torch.tensor([0, 3])
    with torch.inference_mode():
        cond, uncond = (plain.denoiser(x, t, class_labels=each) for each in (labels, torch.tensor([4, 4])))
        found = guided.denoiser(x, t, class_labels=labels)
    torch.testing.assert_close(found, uncond + 3.0 * (cond - uncond), rtol=0, atol=1e-5)
