"""The recipe of the built-in digits: what it writes where. The training itself is stood in for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from mmd_finetune.digits_encoders import ARCHITECTURES
from recipes import train_digits
from recipes.train_digits import Places

OLD, NEW = {"torch": "2.11", "threads": 2}, {"torch": "2.13", "threads": 1}
PUBLISHED = {"digits-conv": 0.997, "digits-mlp": 0.994}
Recipe = Callable[..., list[dict[str, Any]]]


def places(folder: Path) -> Places:
    return Places(folder / "encoders", folder / "model", folder / "log.json")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Runs ``main`` with arguments; gives the logs from which the card was written, none if it was not."""
    shipped, cards = places(tmp_path / "shipped"), list[dict[str, Any]]()
    shipped.model.mkdir(parents=True)
    shipped.log.write_text(json.dumps({"environment": OLD, "held_out_accuracy": PUBLISHED, "curve": [1]}))
    monkeypatch.setattr(train_digits, "SHIPPED", shipped)
    monkeypatch.setattr(train_digits, "TRIAL", places(tmp_path / "trial"))
    monkeypatch.setattr(train_digits, "environment", lambda: NEW)
    monkeypatch.setattr(train_digits, "train_encoder", lambda name, *_: (ARCHITECTURES[name](), 0.5))
    denoiser = (train_digits.new_denoiser(), DDIMScheduler(), [{"step": 1}])
    monkeypatch.setattr(train_digits, "train_denoiser", lambda *_: denoiser)
    monkeypatch.setattr(train_digits, "write_card", lambda: cards.append(json.loads(shipped.log.read_text())))

    def run(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["train_digits.py", *arguments])
        train_digits.main()
        return cards

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_encoders_alone_are_in_the_card_with_the_environment_of_each(recipe: Recipe, tmp_path: Path) -> None:
    (log,) = recipe("--encoders", "digits-mlp", "digits-residual")
    assert log["held_out_accuracy"] == {"digits-conv": 0.997, "digits-mlp": 0.5, "digits-residual": 0.5}
    assert (log["environment"], log["curve"]) == (OLD, [1])
    trained = dict.fromkeys(("denoiser", "digits-conv"), OLD)
    assert log["environments"] == trained | dict.fromkeys(("digits-mlp", "digits-residual"), NEW)
    written = {"digits-mlp.safetensors", "digits-residual.safetensors"}
    assert {path.name for path in (tmp_path / "shipped/encoders").iterdir()} == written


def test_a_whole_run_has_one_environment(recipe: Recipe, tmp_path: Path) -> None:
    (log,) = recipe()
    assert log["environments"] == dict.fromkeys(("denoiser", *ARCHITECTURES), NEW)
    assert log["held_out_accuracy"] == dict.fromkeys(ARCHITECTURES, 0.5)
    assert (tmp_path / "shipped/model/unet/config.json").is_file()
    assert not (tmp_path / "trial").exists()


@pytest.mark.parametrize("arguments", [(), ("--encoders", "digits-mlp")], ids=["all", "an encoder"])
def test_a_trial_leaves_what_is_shipped(arguments: tuple[str, ...], recipe: Recipe, tmp_path: Path) -> None:
    before = files(tmp_path / "shipped")
    assert recipe("--scale", "0.01", *arguments) == []
    assert files(tmp_path / "shipped") == before
    assert (tmp_path / "trial/encoders/digits-mlp.safetensors").is_file()
    assert json.loads((tmp_path / "trial/log.json").read_text())["held_out_accuracy"]["digits-mlp"] == 0.5
