"""The recipe of the Fashion-MNIST study: what it leaves, and that a stopped training ends as one that was not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError
from mmd_finetune.data import load_images
from mmd_finetune.features import load_encoder
from mmd_finetune.files import write_json
from recipes import state, train_fashion, training
from recipes.classifier import train_classifier
from recipes.training import Training, train_denoiser


def tiny_network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def trained(plan: Training) -> UNet2DModel:
    average, curve = train_denoiser(tiny_network(), DDIMScheduler(), images(32), images(16), plan)
    assert [point["step"] for point in curve] == list(range(2, 41, 2))
    curves.append([{name: point[name] for name in ("step", "loss", "held_out")} for point in curve])
    return average


curves: list[list[dict[str, float]]] = []


def stopped_at(step: int, plan: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = training._advance

    def stopping(run: training._Run, *arguments: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        advance(run, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "_advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(plan)


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.0)
    whole = trained(Training(40, 4, warm_up=2))
    plan = Training(40, 4, warm_up=2, state=tmp_path / "state.pt")
    stopped_at(28, plan, monkeypatch)  # between two points of the curve
    losses = torch.load(tmp_path / "state.pt", weights_only=True)["beside"]["recent"]
    assert {loss.untyped_storage().nbytes() for loss in losses} == {4}  # a number, not what it is the mean of
    again = trained(plan)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert curves[-1] == curves[-2]


def test_a_state_that_does_not_fit_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.0)
    plan = Training(40, 4, state=tmp_path / "state.pt")
    stopped_at(3, plan, monkeypatch)
    with pytest.raises(UsageError, match=r"of a training with .*'peak_rate': 0\.0002.*, now .*'peak_rate': 0\.5"):
        trained(replace(plan, peak_rate=0.5))
    before = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(before[:1000])
    with pytest.raises(UsageError, match=r"state\.pt is no state of this training; remove it to start again"):
        trained(plan)
    (tmp_path / "state.pt").write_bytes(before)
    trained(plan)


class Stopping(nn.Module):
    """A classifier with numbers of its own beside the weights, which gives up before its n-th batch."""

    def __init__(self, last: int) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
        self.left = last

    def forward(self, x: Tensor) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        logits: Tensor = self.layers(x)
        return logits


def test_a_stopped_classifier_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.0)
    given = images(32), torch.arange(32) % 10, 9
    whole = train_classifier(Stopping(9), *given, batch=4)
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train_classifier(Stopping(5), *given, path, batch=4)
    again = train_classifier(Stopping(4), *given, path, batch=4)  # no more than the four that are left
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(UsageError, match=r"of a training with .*'batch': 4.*, now .*'batch': 8"):
        train_classifier(Stopping(9), *given, path, batch=8)


def test_the_recipe_leaves_a_base_its_data_and_two_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 256, (24, 28, 28), dtype=np.uint8), np.arange(24) % 10
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    out = tmp_path / "out"
    options = ("--data", tmp_path / "data.npz", "--out", out, "--steps", 2, "--batch", 2, "--encoder-steps", 3)
    monkeypatch.setattr(sys, "argv", ["train_fashion", *map(str, options)])
    train_fashion.main()
    base = load_checkpoint(str(out / "base"))
    assert base.shape == (1, 32, 32)
    facts = json.loads((out / "training.json").read_text())
    assert facts["parameters"] >= 2_000_000
    assert sorted(facts["accuracy"]) == ["fashion-conv", "fashion-residual"]
    assert not list(out.glob("*-state.pt"))
    padded = load_images(str(out / "train.npz"))
    assert padded.shape == (24, 1, 32, 32)
    assert np.all(padded[:, :, :2] == -1.0)
    for name, width in (("fashion-conv", 128), ("fashion-residual", 96)):
        assert load_encoder(f"torchscript:{out / name}.pt")(torch.from_numpy(padded[:3])).shape == (3, width)
    with pytest.raises(UsageError, match="holds a finished training; choose another --out"):
        train_fashion.main()
    (out / "training.json").unlink()
    before = load_encoder(f"torchscript:{out / 'fashion-residual.pt'}")(torch.from_numpy(padded[:3]))
    write_json(out / "encoders.json", {"steps": 3, "accuracy": {"fashion-conv": facts["accuracy"]["fashion-conv"]}})
    train_fashion.main()  # as after a stop between the two
    assert json.loads((out / "training.json").read_text())["accuracy"] == facts["accuracy"]
    again = load_encoder(f"torchscript:{out / 'fashion-residual.pt'}")(torch.from_numpy(padded[:3]))
    assert torch.equal(again, before)
    (out / "training.json").unlink()
    monkeypatch.setattr(train_fashion, "train_classifier", lambda *_: pytest.fail("the encoders were there"))
    train_fashion.main()
    (out / "training.json").unlink()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "4"])
    with pytest.raises(UsageError, match=r"encoders\.json: trained for 3 steps, asked for 4; choose another --out"):
        train_fashion.main()
