"""Encoders through transformers, on small random models saved to disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmd_export.errors import NotAvailableError, UsageError
from mmd_finetune.features import load_encoder, load_encoders, require_fit
from mmd_finetune.preprocess import Preprocess, read_recipe
from tests.finetune.vision_models import PROCESSOR, SIDE, save_vision_model

WEIGHTS, PROCESSOR_FILE = "model.safetensors", "preprocessor_config.json"


def images(count: int = 3, channels: int = 3, side: int = 24) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def prepared(values: Tensor) -> Tensor:
    result: Tensor = Preprocess(read_recipe(PROCESSOR, {}, "test"))(values)
    return result


def clip_embedding(model: Any, pixels: Tensor) -> Tensor:
    embedding: Tensor = model.visual_projection(model.vision_model(pixels).pooler_output)
    return embedding


def of_all_patches(model: Any, pixels: Tensor) -> Tensor:
    """The mean over the tokens of ViT-MAE, which the order of the patches does not change."""
    model.config.mask_ratio = 0.0
    hidden: Tensor = model.vit(pixels, noise=torch.rand(len(pixels), 16)).last_hidden_state
    assert hidden.shape[1] == 17
    return hidden.mean(1)


# What each family's features are, computed from the model itself.
FEATURES: dict[tuple[str, str], Callable[[Any, Tensor], Tensor]] = {
    ("clip", "clip"): clip_embedding,
    ("clip", "clip_vision"): lambda model, pixels: model(pixels).image_embeds,
    ("siglip", "siglip"): lambda model, pixels: model.vision_model(pixels).pooler_output,
    ("siglip", "siglip_vision"): lambda model, pixels: model(pixels).pooler_output,
    ("dino", "dinov2"): lambda model, pixels: model(pixels).last_hidden_state[:, 0],
    ("dino", "dinov3"): lambda model, pixels: model(pixels).last_hidden_state[:, 0],
    ("hf", "vit"): lambda model, pixels: model(pixels).pooler_output,
    ("hf", "vit_classifier"): lambda model, pixels: model.vit(pixels).last_hidden_state[:, 0],
    ("hf", "vit_mae"): of_all_patches,
    ("hf", "resnet"): lambda model, pixels: model(pixels).last_hidden_state.mean((2, 3)),
    ("hf", "siglip"): lambda model, pixels: model.vision_model(pixels).pooler_output,
    ("hf", "clip"): lambda model, pixels: model.vision_model(pixels).pooler_output,
}


@pytest.mark.parametrize(("family", "kind"), FEATURES)
def test_features_are_those_of_the_model(family: str, kind: str, tmp_path: Path) -> None:
    model = save_vision_model(kind, tmp_path / "model")
    encoder = load_encoder(f"{family}:{tmp_path / 'model'}")
    with torch.no_grad():
        expected = FEATURES[family, kind](model, prepared(images()))
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-5, atol=1e-6)
    assert encoder.name == f"{family}:model"
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    require_fit(encoder, (3, 24, 24))
    require_fit(encoder, (1, 8, 8))


def test_no_encoder_draws(tmp_path: Path) -> None:
    """ViT-MAE hides three quarters of the patches from itself, other ones each time, unless it is told not to."""
    model = save_vision_model("vit_mae", tmp_path)
    assert not torch.equal(*(model.vit(prepared(images())).last_hidden_state for _ in range(2)))
    encoder, before = load_encoder(f"hf:{tmp_path}"), torch.get_rng_state()
    assert torch.equal(encoder(images()), encoder(images()))
    torch.testing.assert_close(encoder(images())[:1], encoder(images()[:1]))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_reaches_the_images_through_the_preprocessing(tmp_path: Path) -> None:
    save_vision_model("clip", tmp_path)
    encoder = load_encoder(f"clip:{tmp_path}")
    x = images(2).requires_grad_(True)
    (encoder(x) ** 2).sum().backward()
    assert x.grad is not None
    # A directional derivative by finite differences.
    direction, step = torch.sign(x.grad), 1e-3
    with torch.no_grad():
        change = [((encoder(x + sign * step * direction)) ** 2).double().sum() for sign in (1, -1)]
    assert float((change[0] - change[1]) / (2 * step)) == pytest.approx(float(x.grad.abs().sum()), rel=2e-2)


def test_float32_whatever_autocast_does(tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path)
    encoder = load_encoder(f"dino:{tmp_path}")
    with torch.no_grad():
        plain = encoder(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder(images()), plain)
            assert not torch.equal(encoder.network(images()).float(), plain)  # it would differ without the guard
        assert encoder(images().bfloat16()).dtype == torch.float32


def test_a_grey_image_is_a_colour_image_with_equal_channels(tmp_path: Path) -> None:
    save_vision_model("clip", tmp_path)
    encoder, grey = load_encoder(f"clip:{tmp_path}"), images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UsageError, match="takes 1 or 3 channels, the model makes 4"):
        require_fit(encoder, (4, 24, 24))


def test_half_precision_weights_are_upcast(tmp_path: Path) -> None:
    model = save_vision_model("clip", tmp_path)
    model.half().save_pretrained(tmp_path)
    encoder = load_encoder(f"clip:{tmp_path}")
    assert {parameter.dtype for parameter in encoder.network.parameters()} == {torch.float32}


def test_shards_are_read(tmp_path: Path) -> None:
    model = save_vision_model("clip", tmp_path / "whole")
    save_vision_model("clip", tmp_path / "parts")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    (tmp_path / "parts" / WEIGHTS).unlink()
    with torch.no_grad():
        one, other = (load_encoder(f"clip:{tmp_path / name}")(images()) for name in ("whole", "parts"))
    assert torch.equal(one, other)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def test_a_pickle_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_vision_model("dinov2", tmp_path)
    pickled(tmp_path)
    (encoder,) = load_encoders([f"dino:{tmp_path}"], (3, 8, 8), torch.device("cpu"))
    assert "pytorch_model.bin is a pickle, read with weights_only=True" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()), model(prepared(images())).pooler_output)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"weights": Path("/tmp")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="transformers cannot load"):
        load_encoder(f"dino:{tmp_path}")


def test_safetensors_come_first(tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    assert not load_encoder(f"dino:{tmp_path}").warnings


def test_the_image_part_of_a_whole_processor_is_followed(tmp_path: Path) -> None:
    other = {**PROCESSOR, "image_mean": [0.1, 0.2, 0.3]}  # not what the family takes without a file
    save_vision_model("clip", tmp_path / "part", other)
    save_vision_model("clip", tmp_path / "whole", None)
    whole = {"image_processor": other, "processor_class": "CLIPProcessor"}
    (tmp_path / "whole/processor_config.json").write_text(json.dumps(whole))
    with torch.no_grad():
        one, same = (load_encoder(f"clip:{tmp_path / name}")(images()) for name in ("part", "whole"))
        (tmp_path / "whole/processor_config.json").unlink()
        usual = load_encoder(f"clip:{tmp_path}/whole")(images())
    assert torch.equal(one, same)
    assert not torch.equal(one, usual)


def without_processor(folder: Path) -> None:
    (folder / PROCESSOR_FILE).unlink()


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(
        {key: value for key, value in weights.items() if "layernorm" not in key}, folder / WEIGHTS, {"format": "pt"}
    )


def nan_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["embeddings.cls_token"][0, 0, 3] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def other_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["layernorm.weight"] = torch.ones(17)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (without_processor, "hf", "preprocessor_config.json does not exist"),
        (missing_tensor, "dino", "tensors of Dinov2Model are missing, first 'layernorm"),
        (nan_tensor, "dino", "embeddings.cls_token holds NaN"),
        (other_shape, "dino", r"layernorm\.weight is \(17,\), the config says \(16,\)"),
        (cut_off, "dino", "transformers cannot load"),
        (unknown_type, "hf", "transformers cannot load .*abacus"),
        (lambda folder: (folder / WEIGHTS).unlink(), "dino", r"model\.safetensors does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "dino", r"config\.json does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), "dino", r"config\.json is not JSON"),
        (lambda _: None, "clip", "its model_type is 'dinov2', clip: takes clip, clip_vision_model; use hf:"),
        (lambda _: None, "siglip", "its model_type is 'dinov2', siglip: takes siglip"),
    ],
)
def test_what_does_not_fit_is_named(damage: Callable[[Path], object], kind: str, said: str, tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=said):
        load_encoder(f"{kind}:{tmp_path}")


@pytest.mark.parametrize("place", ["./nowhere", "/no/where", "../a/b", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_never_looked_for_on_the_hub(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the network was used"))
    with pytest.raises(UsageError, match="does not exist; a folder that save_pretrained wrote, or a hub id"):
        load_encoder(f"clip:{place}")


def test_a_hub_id_is_fetched_safetensors_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_vision_model("clip", tmp_path)
    asked: list[tuple[str, list[str]]] = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    encoder = load_encoder("clip:somebody/some-clip")
    assert encoder.name == "clip:somebody/some-clip"
    assert [hub_id for hub_id, _ in asked] == ["somebody/some-clip"]
    assert not any(pattern.endswith(".bin") for pattern in asked[0][1])
    pickled(tmp_path)
    load_encoder("clip:somebody/some-clip")
    assert "pytorch_model.bin" in asked[2][1]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(NotAvailableError, match="could not be downloaded: no route to host"):
        load_encoder("dino:somebody/some-dino")


def test_options_change_the_preprocessing_and_the_hash(tmp_path: Path) -> None:
    save_vision_model("clip", tmp_path)
    plain = load_encoder(f"clip:{tmp_path}")
    changed = load_encoder(f"clip:{tmp_path}?size={SIDE}&resample=bilinear&mean=0.5&std=0.5")
    with torch.no_grad():
        assert not torch.allclose(plain(images()), changed(images()))
    assert plain.sha256 != changed.sha256
    assert changed.name.endswith(f"?size={SIDE}&resample=bilinear&mean=0.5&std=0.5")
    assert load_encoder(f"clip:{tmp_path}").sha256 == plain.sha256
    with pytest.raises(UsageError, match="option colour=red is unknown; known: size, resample, mean, std"):
        load_encoder(f"clip:{tmp_path}?colour=red")


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    save_vision_model("dinov2", tmp_path)
    before = load_encoder(f"dino:{tmp_path}").sha256
    weights = load_file(tmp_path / WEIGHTS)
    weights["layernorm.weight"][0] += 1.0
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    assert load_encoder(f"dino:{tmp_path}").sha256 != before


def test_the_size_that_a_model_cannot_take_is_refused_before_use(tmp_path: Path) -> None:
    save_vision_model("clip", tmp_path)
    with pytest.raises(UsageError, match=r"on 2 images \(3, 24, 24\) it fails .*; state its size"):
        require_fit(load_encoder(f"clip:{tmp_path}?size=40"), (3, 24, 24))


@pytest.mark.parametrize(
    ("family", "kind", "size", "crop", "resample"),
    [
        ("clip", "clip", SIDE, (SIDE, SIDE), "bicubic"),
        ("clip", "clip_vision", SIDE, (SIDE, SIDE), "bicubic"),
        ("dino", "dinov2", 256, (224, 224), "bicubic"),
        ("dino", "dinov3", (224, 224), None, "bilinear"),
        ("siglip", "siglip", (SIDE, SIDE), None, "bicubic"),
    ],
)
def test_the_published_preprocessing_stands_in_for_a_missing_config(
    family: str, kind: str, size: Any, crop: Any, resample: str, tmp_path: Path
) -> None:
    save_vision_model(kind, tmp_path, processor=None)
    preprocess = load_encoder(f"{family}:{tmp_path}").network.get_submodule("preprocess")
    assert isinstance(preprocess, Preprocess)
    assert (preprocess.recipe.size, preprocess.recipe.crop, preprocess.recipe.resample) == (size, crop, resample)


def test_without_transformers_the_line_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotAvailableError, match=r"transformers is not installed; pip install 'mmd-export\[finetune\]'"):
        load_encoder(f"clip:{tmp_path}")
