"""TorchScript files as frozen networks."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mmd_export.errors import UsageError, one_line
from mmd_finetune.encoder import frozen


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive with code in it; a state dict is one without."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(part.split("/", 1)[-1].startswith("code/") for part in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def load_torchscript(path: Path, name: str) -> nn.Module:
    """The module in ``path`` on the CPU, all its tensors finite; raises UsageError."""
    if not is_torchscript(path):
        raise UsageError(f"encoder {name}: {path} is damaged or no TorchScript file; make one with torch.jit.save")
    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated for torch.export, but published encoders are in this format.
            warnings.simplefilter("ignore", DeprecationWarning)
            network: nn.Module = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"encoder {name}: {path} cannot be read: {one_line(error)}; copy it again") from error
    require_finite(network.state_dict(), f"encoder {name}: {path}")
    return frozen(network)


def require_finite(weights: dict[str, Tensor], where: str) -> None:
    """Raise UsageError that names the first tensor with a NaN or an infinity."""
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{where}: {key} holds NaN or infinity; copy or download the weights again")
