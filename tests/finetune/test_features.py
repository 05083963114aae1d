"""Encoders: frozen, strict, differentiable; the reference of real features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmd_export.errors import UsageError
from mmd_finetune.digits import load_digits_split
from mmd_finetune.encoder_source import Source
from mmd_finetune.encoders import digits as digits_family
from mmd_finetune.encoders import families, random_conv
from mmd_finetune.features import Encoder, encoder_forms, load_encoder, load_encoders, require_fit
from mmd_finetune.kernels import KERNELS, SHOWN_ROWS
from mmd_finetune.mmd import unbiased_mmd2
from mmd_finetune.reference import encode_in_batches, make_reference
from recipes import draw_random_conv


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return torch.from_numpy(load_digits_split().train_images).clone()


@pytest.mark.parametrize("name", ["digits-conv", "digits-residual", "digits-mlp", "pixels"])
def test_encoder_is_frozen_and_lets_gradients_through(name: str, real: torch.Tensor) -> None:
    encoder = load_encoder(name)
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    images = real[:4].clone().requires_grad_(True)
    output = encoder(images)
    assert output.shape == (4, 64)
    assert output.dtype == torch.float32
    output.square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0.0


@pytest.mark.parametrize("name", ["digits-conv", "digits-residual", "digits-mlp"])
def test_classifiers_know_the_held_out_scans(name: str) -> None:
    split = load_digits_split()
    predicted = load_encoder(name).logits(torch.from_numpy(split.held_out_images)).argmax(1).numpy()
    assert float((predicted == split.held_out_labels).mean()) > 0.96


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 7), (1, 2, 2)])
def test_random_convolutions_take_images_of_any_size(shape: tuple[int, int, int]) -> None:
    encoder = load_encoder("random-conv")
    require_fit(encoder, shape)
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    features = encoder(images)
    assert features.shape == (3, 384)
    assert torch.equal(features, load_encoder("random-conv")(images))
    torch.testing.assert_close(encoder(images[1:2]), features[1:2])  # whatever it is in a batch with
    assert float(torch.pdist(features).min()) > 0.25 * float(features.norm(dim=1).max())  # images lie far apart


def test_random_convolutions_are_the_same_everywhere_and_draw_nothing() -> None:
    before = torch.get_rng_state()
    encoder = load_encoder("random-conv")
    assert torch.equal(torch.get_rng_state(), before)
    # A run goes on only with the encoders that it began with, and features on disk are found by it.
    assert encoder.sha256 == "4aa105c3aeb0657de2ed128748641fdd6c624793b7f715d82b04c74fb7a765d5"


def test_random_convolutions_are_those_of_the_recipe() -> None:
    stored, drawn = load_file(random_conv.WEIGHTS), draw_random_conv.drawn()
    assert stored.keys() == drawn.keys()
    for name, weight in drawn.items():
        torch.testing.assert_close(stored[name], weight, rtol=1e-5, atol=1e-6)  # last bits are those of the CPU


def test_absent_random_convolutions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_conv, "WEIGHTS", tmp_path / "random-conv.safetensors")
    with pytest.raises(UsageError, match=r"encoder random-conv: weights .* cannot be read .*; install again"):
        load_encoder("random-conv")


def test_random_convolutions_have_the_variance_of_their_fan_in() -> None:
    weights = [each for each in load_encoder("random-conv").network.parameters() if each.dim() == 4]
    for weight in weights:
        assert float(weight.var()) * weight[0].numel() == pytest.approx(2.0, rel=0.1)


def test_random_convolutions_refuse_other_colours() -> None:
    with pytest.raises(UsageError, match="random-conv takes 1 or 3 channels, the model makes 4"):
        require_fit(load_encoder("random-conv"), (4, 8, 8))


def test_pixels_have_no_head(real: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="encoder pixels has no classifier head"):
        load_encoder("pixels").logits(real[:2])


@pytest.mark.parametrize("spec", ["vgg", "vgg:file.pth", "inception", "inception:", "pixels:file", ""])
def test_unknown_encoder_lists_the_known(spec: str) -> None:
    known = "digits-conv, digits-mlp, digits-residual, pixels, random-conv, clip:ID_OR_FOLDER, dino:ID_OR_FOLDER"
    with pytest.raises(UsageError, match=f"encoder '{spec}' is unknown; known: {known}"):
        load_encoder(spec)


def test_every_family_says_how_it_is_written() -> None:
    for kind, family in families().items():
        assert any(form.partition(":")[0] == kind for form in family.forms)
    assert len(encoder_forms()) == len(set(encoder_forms())) == len(families())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("pixels", "pixels"),
        ("inception:/home/me/weights/pt.pth?resize=tensorflow", "inception:pt.pth?resize=tensorflow"),
        ("clip:openai/clip-vit-base-patch32", "clip:openai/clip-vit-base-patch32"),
        ("clip:./models/vit", "clip:vit"),
        ("clip:models/deep/vit", "clip:vit"),
        ("clip:models/", "clip:models"),
    ],
)
def test_the_name_of_an_encoder_has_no_folder_of_this_machine(spec: str, name: str) -> None:
    assert Source.parse(spec).name == name


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source.parse("clip:mine/vit").is_hub_id
    (tmp_path / "mine/vit").mkdir(parents=True)
    assert not Source.parse("clip:mine/vit").is_hub_id
    assert Source.parse("clip:mine/vit").name == "clip:vit"


def test_a_question_mark_in_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "what?.pth").write_bytes(b"")
    assert Source.parse(f"inception:{tmp_path}/what?.pth").options == {}


def test_two_encoders_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="2 encoders are called pixels; name each once"):
        load_encoders(["pixels", "pixels"], (1, 8, 8), torch.device("cpu"))


def test_hashes_tell_the_built_in_encoders_apart() -> None:
    hashes = {load_encoder(name).sha256 for name in ("digits-conv", "digits-mlp", "pixels", "random-conv")}
    assert len(hashes) == 4
    assert all(len(value) == 64 for value in hashes)


def test_encoder_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"digits-conv takes images \(1, 8, 8\), the model makes \(3, 32, 32\)"):
        require_fit(load_encoder("digits-conv"), (3, 32, 32))
    require_fit(load_encoder("pixels"), (3, 32, 32))


def damaged(tmp_path: Path, kind: str) -> None:
    weights = load_file(digits_family.FOLDER / "digits-mlp.safetensors")
    if kind == "nan":
        weights["head.bias"][3] = float("nan")
    elif kind == "missing":
        del weights["head.bias"]
    elif kind == "shape":
        weights["head.bias"] = torch.zeros(11)
    save_file(weights, tmp_path / "digits-mlp.safetensors")
    if kind == "truncated":
        data = (tmp_path / "digits-mlp.safetensors").read_bytes()
        (tmp_path / "digits-mlp.safetensors").write_bytes(data[:1000])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "head.bias holds NaN"),
        ("missing", "do not fit the config; missing: head.bias"),
        ("shape", r"head.bias is \(11,\), the config says \(10,\)"),
        ("truncated", "cannot be read"),
    ],
)
def test_damaged_weights_are_named(kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(tmp_path, kind)
    monkeypatch.setattr(digits_family, "FOLDER", tmp_path)
    with pytest.raises(UsageError, match=said):
        load_encoder("digits-mlp")


def test_absent_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_family, "FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"digits-mlp\.safetensors cannot be read"):
        load_encoder("digits-mlp")


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_reference_gives_the_mmd_of_its_encoder(kernel: str, real: torch.Tensor) -> None:
    encoder = load_encoder("digits-conv")
    reference = make_reference(encoder, kernel, encode_in_batches(encoder, real[:300]))
    generated = real[300:340]
    expected = unbiased_mmd2(reference.kernel, encoder(generated).double(), encoder(real[:300]).double())
    assert reference.features.dtype == torch.float64
    torch.testing.assert_close(reference.mmd2(encoder(generated)), expected, rtol=1e-6, atol=1e-9)


def test_landmarks_keep_only_the_rows_that_stand_for_all() -> None:
    features = torch.randn(SHOWN_ROWS + 1, 3, generator=torch.Generator().manual_seed(0))
    reference = make_reference(load_encoder("pixels"), "linear", features, kind="nystrom", landmarks=4)
    kept = reference.features
    assert 0 < len(kept) < len(features)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_real_images_that_break_the_encoder_are_refused(real: torch.Tensor) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) / 0.0

    broken = Encoder("broken", Broken())
    with pytest.raises(UsageError, match="encoder broken gives NaN or infinity for a real image"):
        make_reference(broken, "linear", encode_in_batches(broken, real[:4]))
