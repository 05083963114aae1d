"""Networks behind one signature: ``denoiser(x, timestep, **conditions) -> output``, x and output (B, C, H, W).

What the output means (epsilon, v, x0) is numbers of the plan, so no adapter converts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmd_export.errors import UsageError


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel without its output wrapper.

    Args:
        unet: the network.
        channels: of the output; a learned variance behind them is left out. None for all.
        timestep_scale: what the timestep is multiplied by (``rescale_timesteps`` of improved-diffusion).
    """

    def __init__(self, unet: nn.Module, channels: int | None = None, timestep_scale: float = 1.0) -> None:
        super().__init__()
        self.unet = unet
        self.channels = channels
        self.timestep_scale = timestep_scale

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Raw output (B, C, H, W) for ``x`` (B, C, H, W), ``timestep`` (1,) and ``class_labels`` int64 (B)."""
        time = timestep if self.timestep_scale == 1.0 else timestep * self.timestep_scale
        if class_labels is None:
            output: Tensor = self.unet(x, time, return_dict=False)[0]
        else:
            output = self.unet(x, time, class_labels, return_dict=False)[0]
        return output if self.channels is None else output[:, : self.channels]


_ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")  # what diffusers takes as added_cond_kwargs


class DiffusersNetwork(nn.Module):
    """A conditional network of diffusers, told its conditions under their own names.

    Args:
        network: UNet2DConditionModel or a transformer.
        channels: of the output; a learned variance behind them is left out.
        timestep_scale: what the timestep is multiplied by (Sana).
        guidance: how the embedded guidance scale of a distilled network is told, by the argument's name:
            ``timestep_cond`` (1, W) as ``guidance_embedding`` gives it, ``guidance`` (1,).
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        timestep_scale: float = 1.0,
        guidance: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.timestep_scale = timestep_scale
        self.guidance = dict(guidance or {})

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Raw output (B, C, H, W) for ``x`` (B, C, H, W) and ``timestep`` (1,)."""
        told: dict[str, Any] = {name: value for name, value in conditions.items() if name not in _ADDED}
        if added := {name: value for name, value in conditions.items() if name in _ADDED}:
            told["added_cond_kwargs"] = added
        for name, value in self.guidance.items():
            told[name] = torch.tensor(value, dtype=x.dtype, device=x.device)
        time = timestep if self.timestep_scale == 1.0 else timestep * self.timestep_scale
        output: Tensor = self.network(x, timestep=time.expand(x.shape[0]), return_dict=False, **told)[0]
        return output[:, : self.channels]


class InDouble(nn.Module):
    """A network in float64 that stays there: where its code casts float64 to float32, the cast is left out.

    The reference is held to more digits than the artefact, and diffusers casts norms and linear attention to float32.
    What starts in float32 stays so: the sinusoids of the timestep, which are as diffusers computes them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor, **conditions: Tensor) -> Tensor:
        """The network's output, float64."""
        with _NoNarrowing():
            output: Tensor = self.network(x, timestep, *labels, **conditions)
        return output


class _NoNarrowing(TorchFunctionMode):
    """``.float()``, ``.to(torch.float32)`` and ``.type(torch.float32)`` of a float64 tensor are the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func in (Tensor.float, Tensor.to, Tensor.type) and args[0].dtype == torch.float64:
            wanted = (*args[1:], *given.values())
            if func is Tensor.float or any(value is torch.float32 for value in wanted):
                return args[0]
        return func(*args, **given)


class ModuleDenoiser(nn.Module):
    """Any module that is called as ``network(x, timestep[, class_labels], **conditions)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """What the module returns, (B, C, H, W)."""
        labels = () if class_labels is None else (class_labels,)
        output: Tensor = self.network(x, timestep, *labels, **conditions)
        return output


@dataclass(frozen=True)
class EdmPreconditioning:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise); Karras et al. 2022, eq. 7 and table 1.

    D guesses the clean image from x = x0 + sigma n, so a step of a plan holds all four: ``scale`` c_in, ``timestep``
    c_noise, ``clean`` (c_skip, c_out), with F as the network.
    """

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float

    @classmethod
    def at(cls, sigma: float, sigma_data: float = 0.5) -> EdmPreconditioning:
        """The numbers at noise level ``sigma`` for data of standard deviation ``sigma_data``."""
        if not (math.isfinite(sigma) and sigma > 0 and math.isfinite(sigma_data) and sigma_data > 0):
            raise UsageError(f"EDM: sigma is {sigma}, sigma_data {sigma_data}; both must be positive")
        total = sigma**2 + sigma_data**2
        return cls(
            c_skip=sigma_data**2 / total,
            c_out=sigma * sigma_data / math.sqrt(total),
            c_in=1.0 / math.sqrt(total),
            c_noise=math.log(sigma) / 4.0,
        )


class EdmDenoiser(nn.Module):
    """D of ``EdmPreconditioning`` on a fixed grid of noise levels, from the raw network F: call ``k``, not a timestep.

    Its output is the clean image, so a plan around it has prediction type ``sample``.
    """

    def __init__(self, network: nn.Module, sigmas: Sequence[float], sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.levels = tuple(EdmPreconditioning.at(sigma, sigma_data) for sigma in sigmas)

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        """D(x; sigma_k), shapes (B, C, H, W)."""
        level = self.levels[k]
        noise = torch.tensor([level.c_noise], dtype=x.dtype, device=x.device)
        output: Tensor = self.network(level.c_in * x, noise, **conditions)
        return level.c_skip * x + level.c_out * output


class EdmRaw(nn.Module):
    """F of ``EdmPreconditioning`` from a network that is D itself, ``network(x, sigma, ...)``: what EDM's plans call.

    F = (D(x; sigma) - c_skip x) / c_out where the plan hands over c_in x and c_noise = log(sigma) / 4.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor, **conditions: Tensor) -> Tensor:
        """F(c_in x; c_noise), shapes (B, C, H, W) and (1,); ``network`` gets sigma (1,)."""
        sigma, data = torch.exp(4.0 * timestep.to(x.dtype)), self.sigma_data
        root = torch.sqrt(sigma**2 + data**2).reshape(1, 1, 1, 1)
        state = root * x
        clean: Tensor = self.network(state, sigma, *labels, **conditions)
        return (clean - (data / root) ** 2 * state) * (root / (data * sigma.reshape(1, 1, 1, 1)))


def timestep_tensor(timestep: float, device: torch.device | None = None) -> Tensor:
    """Shape (1,): int64 for a whole number, as diffusers' schedulers give, else float32."""
    if float(timestep).is_integer():
        return torch.tensor([int(timestep)], dtype=torch.int64, device=device)
    return torch.tensor([timestep], dtype=torch.float32, device=device)


def typical_timestep(timesteps: Sequence[float]) -> float:
    """The one to capture a graph with: a fractional one if there is any, so that float32 serves the whole grid."""
    return next((timestep for timestep in timesteps if not float(timestep).is_integer()), timesteps[0])


class AtTimesteps(nn.Module):
    """A denoiser on a fixed grid: call ``k`` instead of a timestep."""

    def __init__(self, denoiser: nn.Module, timesteps: Sequence[float]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.timesteps = tuple(timesteps)

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        """The denoiser's output at the timestep of call ``k``."""
        timestep = timestep_tensor(self.timesteps[k], x.device)
        output: Tensor = self.denoiser(x, timestep, **conditions)
        return output
