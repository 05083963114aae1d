"""TorchScript files as encoders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmd_export.errors import UsageError
from mmd_finetune.features import load_encoder, require_fit


class Net(nn.Module):
    """A convolution whose map is pooled or not."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool = nn.Conv2d(3, 4, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.pool:
            return y.mean((2, 3))
        return y


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x.flatten(1)}


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * 10.0).long()


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0.0


class Steep(nn.Module):
    """Finite values, and no derivative at -1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x + 1.0).flatten(1)


class Mixing(nn.Module):
    """The images of a batch take from one another, as with batch norm in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return y - 0.1 * y.mean(0, keepdim=True)


class Squares(nn.Module):
    """They take from one another what does not change with the sign."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return y / (1.0 + y.square().mean(0, keepdim=True))


class Noisy(nn.Module):
    """Draws for every image."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return y + torch.randn_like(y)


def saved(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)
    return f"torchscript:{path}"


def images(side: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("pool", [False, True])
def test_the_script_gets_the_images_as_they_are_and_maps_are_averaged(pool: bool, tmp_path: Path) -> None:
    encoder = load_encoder(saved(Net(pool), tmp_path / "net.pt"))
    torch.testing.assert_close(encoder(images()), Net(pool=True)(images()))
    assert encoder.name == "torchscript:net.pt"
    require_fit(encoder, (3, 6, 6))


@pytest.mark.parametrize(
    ("query", "seen"),
    [
        ("?range=0..1", lambda x: (x + 1) / 2),
        ("?range=0..255", lambda x: (x + 1) * 127.5),
        ("?range=-1..1", lambda x: x),
        ("?mean=0.25&std=0.5", lambda x: ((x + 1) / 2 - 0.25) / 0.5),
        ("?range=0..255&mean=100/110/120", lambda x: (x + 1) * 127.5 - torch.tensor([100.0, 110, 120])[:, None, None]),
    ],
)
def test_options_say_what_it_takes(query: str, seen: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    encoder = load_encoder(saved(Net(pool=True), tmp_path / "net.pt") + query)
    torch.testing.assert_close(encoder(images()), Net(pool=True)(seen(images())), rtol=1e-4, atol=1e-4)


def test_size_resizes(tmp_path: Path) -> None:
    spec = saved(Net(pool=True), tmp_path / "net.pt")
    constant = torch.full((2, 3, 6, 6), 0.5)
    torch.testing.assert_close(
        load_encoder(f"{spec}?size=12")(constant), Net(pool=True)(torch.full((2, 3, 12, 12), 0.5))
    )
    one, other = load_encoder(spec), load_encoder(f"{spec}?size=12")
    assert one.sha256 != other.sha256


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Tokens(), r"it gives \(2, 3, 36\) float32; \(2, d\) float32 is expected"),
        (Whole(), r"it gives \(2, 108\) int64"),
        (Named(), "it gives dict; a tensor"),
        (Infinite(), "a feature is NaN or infinite"),
        (Detached(), "no gradient comes back; an encoder of the loss must be differentiable"),
        (Steep(), "the gradient holds NaN or infinity"),
        (Squares(), "must not mix the images of a batch"),
        (Mixing(), r"features of the first change by \d+\.\d% with the second; an encoder must not mix"),
        (
            nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()),
            "must not mix the images of a batch",
        ),
    ],
)
def test_what_is_no_encoder_is_refused_before_the_first_step(module: nn.Module, said: str, tmp_path: Path) -> None:
    encoder = load_encoder(saved(module, tmp_path / "net.pt"))
    with pytest.raises(UsageError, match=said):
        require_fit(encoder, (3, 6, 6))


def test_a_held_out_encoder_needs_no_gradient(tmp_path: Path) -> None:
    require_fit(load_encoder(saved(Detached(), tmp_path / "net.pt")), (3, 6, 6), gradient=False)


def test_an_encoder_that_draws_is_refused_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with pytest.raises(
        UsageError, match=r"features change by \d+\.\d% from one call to the next; an encoder must draw"
    ):
        require_fit(load_encoder(saved(Noisy(), tmp_path / "net.pt")), (3, 6, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_number_of_channels(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"on 2 images \(1, 6, 6\) it fails .*three equal channels of one, as \?range=-1..1"
    ):
        require_fit(load_encoder(saved(Net(), tmp_path / "net.pt")), (1, 6, 6))
    require_fit(load_encoder(saved(Net(), tmp_path / "net.pt") + "?range=-1..1"), (1, 6, 6))


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    spec = saved(Net(), tmp_path / "net.pt")
    data = (tmp_path / "net.pt").read_bytes()
    for content in (data[: len(data) // 2], b"", b"garbage"):
        (tmp_path / "net.pt").write_bytes(content)
        with pytest.raises(UsageError, match=r"net\.pt is damaged or no TorchScript file"):
            load_encoder(spec)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match=r"net\.pt is damaged or no TorchScript file"):
        load_encoder(spec)
    middle = bytearray(data)
    middle[data.index(b"code/") + 200] ^= 0xFF
    (tmp_path / "net.pt").write_bytes(middle)
    with pytest.raises(UsageError, match=r"torchscript:net\.pt"):
        load_encoder(spec)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.conv.bias[1] = float("nan")  # type: ignore[index]
    with pytest.raises(UsageError, match=r"conv\.bias holds NaN or infinity"):
        load_encoder(saved(net, tmp_path / "net.pt"))


def test_unknown_options(tmp_path: Path) -> None:
    spec = saved(Net(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="option layer=3 is unknown; known: size, resample, mean, std, range"):
        load_encoder(f"{spec}?layer=3")
    with pytest.raises(UsageError, match=r"range is '0..2'; known: -1..1, 0..1, 0..255"):
        load_encoder(f"{spec}?range=0..2")
