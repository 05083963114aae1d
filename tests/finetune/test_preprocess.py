"""Preprocessing in torch against the processors of transformers, which use Pillow on bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mmd_export.errors import UsageError
from mmd_finetune.preprocess import Preprocess, Recipe, read_recipe

ROUNDING = 1.5 / 255  # Pillow rounds the resized image to bytes, and its passes too


def smooth(count: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes (N, H, W, 3) without aliasing, so that rounding is all that differs."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(2 * np.pi * (x * (1 + i) / width + c / 3 + y * (2 - i) / height)) for i in range(count) for c in range(3)
    ]
    return np.rint((np.array(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1) + 1) * 127.5).astype(
        np.uint8
    )


def with_pillow(kind: str, name: str) -> Any:
    """The processor on Pillow. Releases of transformers that name it so have one on torch under the plain name."""
    place = f"transformers.models.{kind}.image_processing"
    try:
        return getattr(importlib.import_module(f"{place}_pil_{kind}"), f"{name}ImageProcessorPil")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"{place}_{kind}"), f"{name}ImageProcessor")


def processor(kind: str) -> Any:
    convnext, levit = with_pillow("convnext", "ConvNext"), with_pillow("levit", "Levit")
    efficientnet = with_pillow("efficientnet", "EfficientNet")
    made: dict[str, Callable[[], Any]] = {
        "clip": with_pillow("clip", "CLIP"),
        "dinov2": lambda: with_pillow("bit", "Bit")(
            size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
        "siglip": with_pillow("siglip", "Siglip"),
        "convnext-224": lambda: convnext(size={"shortest_edge": 224}),
        "convnext-384": convnext,
        "levit": levit,
        "levit-192": lambda: levit(size={"shortest_edge": 192}, crop_size=192),
        "efficientnet": efficientnet,
        "efficientnet-plain": lambda: efficientnet(include_top=False, size=64),
        "efficientnet-top": lambda: efficientnet(do_normalize=False, size=64),
    }
    return made[kind]()


def assert_like(made: Any, config: dict[str, Any], size: tuple[int, int]) -> None:
    """The recipe of ``config`` gives what the processor gives."""
    pixels = smooth(2, *size)
    expected = torch.tensor(np.stack(made(list(pixels))["pixel_values"]))
    recipe = read_recipe(config, {}, "encoder")
    ours = Preprocess(recipe)(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) < ROUNDING / min(recipe.std)


PUBLISHED = ("clip", "dinov2", "siglip", "convnext-224", "convnext-384", "levit", "levit-192")
EFFICIENT = ("efficientnet", "efficientnet-plain", "efficientnet-top")


@pytest.mark.parametrize("kind", [*PUBLISHED, *EFFICIENT])
@pytest.mark.parametrize("size", [(64, 64), (300, 280)])
def test_like_the_published_processor(kind: str, size: tuple[int, int]) -> None:
    made = processor(kind)
    assert_like(made, made.to_dict(), size)


def old(kind: str, **numbers: Any) -> dict[str, Any]:
    """A config as the first releases wrote it: of a feature extractor, with bare numbers."""
    plain = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    return {"feature_extractor_type": f"{kind}FeatureExtractor", **plain, **numbers}


OLD = (
    old("ConvNext", size=224, crop_pct=0.875),
    old("ConvNext", size=384, crop_pct=None),
    old("Levit", size=224, do_center_crop=True),
    old("DeiT", size=256, do_center_crop=True, crop_size=224),
    old("CLIP", size=224, do_center_crop=True, crop_size=224),
    old("Beit", size=224, do_center_crop=False, crop_size=224),
)


@pytest.mark.parametrize("config", OLD, ids=lambda config: f"{config['feature_extractor_type']}-{config['size']}")
def test_like_the_processor_with_a_config_of_its_first_releases(config: dict[str, Any]) -> None:
    kind = config["feature_extractor_type"].removesuffix("FeatureExtractor")
    made = with_pillow(kind.lower(), kind).from_dict(dict(config))
    assert_like(made, config, (300, 280))


def test_bytes_and_floats() -> None:
    images = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    config = {"do_resize": False, "do_normalize": False}
    assert Preprocess(read_recipe(config, {}, "x"))(images)[0, 0, 0].tolist() == [0.0, 1.0]
    assert Preprocess(read_recipe(config | {"do_rescale": False}, {}, "x"))(images)[0, 0, 0].tolist() == [0.0, 255.0]
    doubled = read_recipe(config | {"rescale_factor": 2 / 255}, {}, "x")
    assert Preprocess(doubled)(images)[0, 0, 0].tolist() == [0.0, 2.0]


def test_old_configs_with_bare_numbers() -> None:
    old = {"size": 224, "do_center_crop": True, "crop_size": 200, "resample": 3, "image_mean": [0.5], "image_std": 0.5}
    assert read_recipe(old, {}, "x") == Recipe(224, (200, 200), "bicubic", (0.5,) * 3, (0.5,) * 3)
    square = {key: value for key, value in old.items() if key != "do_center_crop"}
    assert read_recipe(square, {}, "x") == Recipe((224, 224), None, "bicubic", (0.5,) * 3, (0.5,) * 3)


NORMAL = {"size": 32, "image_mean": 0.5, "image_std": 0.5}


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"do_pad": True}, {}, "do_pad is True, a step that is not supported"),
        ({"do_flip_channel_order": True}, {"size": "32"}, "do_flip_channel_order is True"),
        ({"size": {"longest_edge": 224}}, {}, r"size is \{'longest_edge': 224\}; a whole number"),
        ({"size_divisor": 32}, {}, "size_divisor is 32, a step that is not supported"),
        ({"size": None}, {}, "size is None"),
        ({"size": 0}, {}, "size is 0"),
        ({"resample": 1}, {}, r"resample is 1, not of \[0, 2, 3\]; state \?resample=bicubic"),
        ({"image_mean": None}, {}, r"image_mean is \[None\]; 1 or 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, {}, r"image_std is \[0.5, 0.0, 0.5\]"),
        ({}, {"size": "big"}, "size is 'big'"),
        ({}, {"resample": "lanczos"}, "resample is 'lanczos'; known: nearest-exact, bilinear, bicubic"),
        ({}, {"mean": "0.1/0.2"}, r"mean is \['0.1', '0.2'\]; 1 or 3 numbers"),
        ({}, {"std": "x"}, r"std is \['x'\]"),
    ],
)
def test_what_cannot_be_followed_is_named(config: dict[str, Any], options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_recipe(NORMAL | config, options, "encoder x")


def test_what_the_user_states_overrules_the_config() -> None:
    config = NORMAL | {"do_pad": True, "resample": 1, "do_center_crop": True, "crop_size": 16}
    options = {"size": "48", "resample": "bicubic", "mean": "0.1/0.2/0.3", "std": "2"}
    assert read_recipe(config, options, "x") == Recipe((48, 48), None, "bicubic", (0.1, 0.2, 0.3), (2.0,) * 3)


def test_a_cut_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the image is \(8, 8\), a cut of \(9, 9\) is larger"):
        Preprocess(Recipe(None, (9, 9), "bilinear", (0.0,) * 3, (1.0,) * 3))(torch.zeros(1, 3, 8, 8))


def test_overshoot_of_bicubic_is_cut_off_as_bytes_are() -> None:
    edge = torch.ones(1, 3, 8, 8)
    edge[..., :4] = -1.0
    values = Preprocess(Recipe((32, 32), None, "bicubic", (0.0,) * 3, (1.0,) * 3))(edge)
    assert (float(values.min()), float(values.max())) == (0.0, 1.0)
