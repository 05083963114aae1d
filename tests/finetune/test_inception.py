"""FID's Inception: names and shapes accounted for, the two pools that differ, resizing, files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_export.errors import UsageError
from mmd_finetune.features import load_encoder, load_encoders, require_fit
from mmd_finetune.inception import FEATURES, FidInception, pooled, resized_as_tensorflow

# Published counts: Keras' InceptionV3 without its top has 21,802,784 numbers, 34,432 of them moving means and
# variances, and no batch norm scales. Convolutions plus two numbers of batch norm a channel are then:
CHANNELS = 34_432 // 2
PARAMETERS = 21_802_784 - 34_432 - CHANNELS + 2 * CHANNELS
HEAD = 2048 * 1008 + 1008


@pytest.fixture(scope="module")
def network() -> FidInception:
    torch.manual_seed(0)
    made = FidInception().eval()
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def state(network: FidInception) -> dict[str, Tensor]:
    """As the published file has it: without the counters of batch norm."""
    return {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.safetensors"
    save_file(state, path)
    return path


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_published_counts(state: dict[str, Tensor]) -> None:
    convolutions = [key for key in state if key.endswith("conv.weight")]
    assert len(convolutions) == 94
    assert len(state) == 94 * 5 + 2
    assert sum(len(state[key]) for key in convolutions) == CHANNELS
    learned = [value for key, value in state.items() if "running" not in key]
    assert sum(value.numel() for value in learned) == PARAMETERS + HEAD


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        ("Conv2d_2b_3x3.conv.weight", (64, 32, 3, 3)),
        ("Conv2d_4a_3x3.bn.running_var", (192,)),
        ("Mixed_5b.branch_pool.conv.weight", (32, 192, 1, 1)),
        ("Mixed_5c.branch5x5_2.conv.weight", (64, 48, 5, 5)),
        ("Mixed_5d.branch3x3dbl_3.conv.weight", (96, 96, 3, 3)),
        ("Mixed_6a.branch3x3.conv.weight", (384, 288, 3, 3)),
        ("Mixed_6b.branch7x7_2.conv.weight", (128, 128, 1, 7)),
        ("Mixed_6c.branch7x7dbl_2.conv.weight", (160, 160, 7, 1)),
        ("Mixed_6e.branch7x7dbl_5.conv.weight", (192, 192, 1, 7)),
        ("Mixed_7a.branch7x7x3_4.conv.weight", (192, 192, 3, 3)),
        ("Mixed_7b.branch3x3_2a.conv.weight", (384, 384, 1, 3)),
        ("Mixed_7b.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)),
        ("Mixed_7c.branch3x3dbl_1.conv.weight", (448, 2048, 1, 1)),
        ("Mixed_7c.branch_pool.bn.weight", (192,)),
        ("fc.weight", (1008, 2048)),
    ],
)
def test_names_and_shapes_of_the_published_file(key: str, shape: tuple[int, ...], state: dict[str, Tensor]) -> None:
    assert tuple(state[key].shape) == shape


def plain(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """Convolution, batch norm, ReLU by hand."""
    layer = network.get_submodule(name)
    conv, bn = layer.get_submodule("conv"), layer.get_submodule("bn")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    y = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding)
    scale = bn.weight / torch.sqrt(bn.running_var + 0.001)
    return F.relu(y * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None])


def test_a_mixed_block_by_hand(network: FidInception) -> None:
    block = network.get_submodule("Mixed_7b")
    x = torch.rand(1, 1280, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        three = plain(block, "branch3x3_1", x)
        double = plain(block, "branch3x3dbl_2", plain(block, "branch3x3dbl_1", x))
        around = (
            F.avg_pool2d(F.pad(x, (1,) * 4), 3, stride=1)
            * 9
            / F.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3), padding=1)
        )
        expected = [
            plain(block, "branch1x1", x),
            *(plain(block, f"branch3x3_2{part}", three) for part in "ab"),
            *(plain(block, f"branch3x3dbl_3{part}", double) for part in "ab"),
            plain(block, "branch_pool", around),
        ]
        torch.testing.assert_close(block(x), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_pools_of_the_fid_graph(network: FidInception) -> None:
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(pooled(ones, "mean"), ones)  # padded zeros would lower the edge
    kinds = {name: network.get_submodule(name).pool for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c")}
    assert kinds == {"Mixed_5b": "mean", "Mixed_6e": "mean", "Mixed_7b": "mean", "Mixed_7c": "max"}
    spike = torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 1.0
    assert int(pooled(spike, "max").sum()) == 9


def test_resizing_as_tensorflow_1() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    row = resized_as_tensorflow(ramp, 8)[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]))
    column = resized_as_tensorflow(ramp.transpose(2, 3), 8)[0, 0, :, 0]
    torch.testing.assert_close(column, row)


def test_pool3_features(network: FidInception, file: Path) -> None:
    encoder = load_encoder(f"inception:{file}")
    with torch.no_grad():
        resized = F.interpolate(images(), (299, 299), mode="bilinear", align_corners=False)
        expected = network(resized)
        assert expected.shape == (2, FEATURES)
        torch.testing.assert_close(encoder(images()), expected)
        grey = images()[:, :1]
        torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    require_fit(encoder, (3, 32, 32))
    assert encoder.name == "inception:pt_inception.safetensors"


def test_the_original_resizing(network: FidInception, file: Path) -> None:
    encoder, usual = load_encoder(f"inception:{file}?resize=tensorflow"), load_encoder(f"inception:{file}")
    with torch.no_grad():
        pixels = (images() + 1.0) * 127.5
        expected = network((resized_as_tensorflow(pixels) - 128.0) / 128.0)
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-3, atol=1e-4)
    assert encoder.sha256 != usual.sha256
    with pytest.raises(UsageError, match="resize is 'pillow'; known: pytorch, tensorflow"):
        load_encoder(f"inception:{file}?resize=pillow")


def test_a_pickle_with_counters_is_read_with_a_warning(
    network: FidInception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    load_encoders([f"inception:{tmp_path / 'pt_inception.pth'}"], (3, 16, 16), torch.device("cpu"), gradient=False)
    assert "pt_inception.pth is a pickle, read with weights_only=True" in caplog.text


def damage(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind == "missing":
        return {key: value for key, value in state.items() if key != "Mixed_6c.branch1x1.bn.bias"}
    if kind == "more":
        return state | {"AuxLogits.fc.weight": torch.zeros(1000, 768)}
    if kind == "shape":  # torchvision's own Inception, of ImageNet's 1000 classes
        return state | {"fc.weight": torch.zeros(1000, 2048)}
    return state | {"Mixed_7c.branch_pool.bn.weight": torch.full((192,), float("nan"))}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", r"^encoder inception:w\.safetensors: .*missing: Mixed_6c.branch1x1.bn.bias"),
        ("more", "unexpected: AuxLogits.fc.weight"),
        ("shape", r"fc\.weight is \(1000, 2048\), the config says \(1008, 2048\)"),
        ("nan", "Mixed_7c.branch_pool.bn.weight holds NaN"),
    ],
)
def test_other_weights_are_named(kind: str, said: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(damage(state, kind), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=said):
        load_encoder(f"inception:{tmp_path / 'w.safetensors'}")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    for name in ("w.pth", "w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut")
        with pytest.raises(UsageError, match=rf"^encoder inception:{name}: .*/{name}"):
            load_encoder(f"inception:{tmp_path / name}")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UsageError, match=r"list\.pth hold list, not a state dict"):
        load_encoder(f"inception:{tmp_path / 'list.pth'}")
    with pytest.raises(UsageError, match="the file does not exist"):
        load_encoder(f"inception:{tmp_path / 'nowhere.pth'}")
    with pytest.raises(UsageError, match="the file is a folder"):
        load_encoder(f"inception:{tmp_path}")


class Script(nn.Module):
    """With the signature of NVIDIA's file: bytes in, features on demand."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        mean = (img.mean((1, 2, 3)) - 128.0) / 128.0
        outcome = mean[:, None] * self.weight[None]
        if return_features:
            return outcome
        return outcome[:, :10]


class NoFeatures(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.flatten(1)


def scripted(module: nn.Module, path: Path) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)
    return f"inception:{path}"


def test_a_script_takes_bytes_and_gives_its_features(tmp_path: Path) -> None:
    encoder = load_encoder(scripted(Script(FEATURES), tmp_path / "inception.pt"))
    x = images()
    mean = ((x + 1) * 127.5).mean((1, 2, 3))
    expected = ((mean - 128) / 128)[:, None] * torch.linspace(0.5, 1.5, FEATURES)
    torch.testing.assert_close(encoder(x).detach(), expected)
    require_fit(encoder, (3, 16, 16))


@pytest.mark.parametrize(
    ("module", "query", "said"),
    [
        (Script(1000), "", r"one image gives \(1, 1000\), FID's pool3 \(1, 2048\)"),
        (NoFeatures(), "", r"takes \(img\), FID's script has return_features; another network is torchscript:FILE"),
        (Script(FEATURES), "?resize=tensorflow", "a TorchScript file resizes by itself"),
    ],
)
def test_other_scripts_are_refused(module: nn.Module, query: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        load_encoder(scripted(module, tmp_path / "inception.pt") + query)


def test_always_float32(file: Path) -> None:
    encoder: Any = load_encoder(f"inception:{file}")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(images().bfloat16()).dtype == torch.float32
