"""FID's Inception: pool3 features of a state dict, or of NVIDIA's TorchScript file, which the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_export.checkpoints.weights import (
    as_float32,
    is_state_dict,
    load_strictly,
    pickle_warning,
    read_pickle,
    read_safetensors,
)
from mmd_export.errors import UsageError
from mmd_export.trt.cache import key_of, sha256_of
from mmd_finetune.encoder import Encoder, Family, frozen
from mmd_finetune.encoder_source import Source
from mmd_finetune.inception import FEATURES, SIDE, FidInception, resized_as_tensorflow
from mmd_finetune.torchscript import is_torchscript, load_torchscript

# The resizing of pytorch-fid, which published the state dict, and of the original graph.
RESIZE = ("pytorch", "tensorflow")


class Pool3(nn.Module):
    """Images (N, 1 or 3, H, W) in [-1, 1] to (N, 2048): resized to 299 x 299, values from -1 to 1."""

    def __init__(self, network: FidInception, resize: str) -> None:
        super().__init__()
        self.network, self.resize = network, resize

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.resize == "tensorflow":
            # Bytes v become (v - 128) / 128 there; with v = 255 (x + 1) / 2 that is 255/256 x - 1/256.
            values = (resized_as_tensorflow(images) * 255.0 - 1.0) / 256.0
        else:
            values = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        features: Tensor = self.network(values)
        return features


class ScriptedPool3(nn.Module):
    """The same from a script that takes values from 0 to 255, resizes by itself, and has ``return_features``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(
            (images.expand(-1, 3, -1, -1) + 1.0) * 127.5,
            return_features=True,
        )
        return features


def _load(source: Source) -> Encoder:
    source.require_options("resize")
    path = source.file()
    resize = source.options.get("resize", RESIZE[0])
    if resize not in RESIZE:
        raise UsageError(f"encoder {source.name}: resize is {resize!r}; known: {', '.join(RESIZE)}")
    warnings: tuple[str, ...] = ()
    if is_torchscript(path):
        network: nn.Module = _scripted(path, source)
    else:
        weights, warnings = _read(path)
        inception = FidInception()
        _fill(inception, weights, path)
        network = Pool3(inception, resize)
    sha256 = key_of({"file": sha256_of([path]), "preprocessing": resize})
    return Encoder(source.name, frozen(network), channels=(1, 3), sha256=sha256, warnings=warnings)


def _scripted(path: Path, source: Source) -> nn.Module:
    if source.options:
        raise UsageError(f"encoder {source.name}: a TorchScript file resizes by itself; leave the options out")
    network = load_torchscript(path, source.name)
    forward: Any = network.forward  # a script's method, which has a schema
    arguments = [argument.name for argument in forward.schema.arguments]
    if "return_features" not in arguments:
        raise UsageError(
            f"encoder {source.name}: forward of {path.name} takes ({', '.join(arguments[1:])}), FID's script has "
            "return_features; another network is torchscript:FILE"
        )
    wrapped = ScriptedPool3(network)
    with torch.no_grad():
        width = tuple(wrapped(torch.zeros(1, 3, SIDE, SIDE)).shape)
    if width != (1, FEATURES):
        raise UsageError(
            f"encoder {source.name}: one image gives {width}, FID's pool3 (1, {FEATURES}); another network is "
            "torchscript:FILE"
        )
    return wrapped


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by name; safetensors, else a pickle of tensors only, with a warning."""
    if path.suffix == ".safetensors":
        return as_float32(read_safetensors(path))
    data = read_pickle(path)
    if not is_state_dict(data):
        raise UsageError(f"weights {path} hold {type(data).__name__}, not a state dict of tensors")
    weights, warnings = as_float32(dict(data))
    return weights, (pickle_warning(path), *warnings)


def _fill(network: FidInception, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor into its place; the counters of batch norm, which files have or have not, mean nothing here."""
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    load_strictly(network, {**counters, **weights}, f"{path} (the layout of pt_inception-2015-12-05 is expected)")


FAMILY = Family(("inception",), "FILE", _load)
