"""diffusers' own scheduler and sampling loop, in float64 and with its noise handed in. torch and diffusers.

diffusers computes its tables in float32 and casts states to it. Both come from the names ``torch.float32``,
``numpy.float32`` and torch's default dtype, so while a scheduler is made or steps, these three mean float64 in its
module. Nothing else of the class is touched. diffusers 0.42.1 has no other way (huggingface/diffusers#3056); delete
when its schedulers take a dtype.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.quiet_diffusers import import_diffusers
from mmd_export.schedule import SchedulerConfig, betas, timestep_grid
from mmd_export.scheduler_keys import DYNAMIC

Draw = Callable[[Any], Tensor]
_WIDER: dict[str, dict[str, Any]] = {
    "torch": {"float32": torch.float64, "float": torch.float64},
    "np": {"float32": np.float64},
}
ROUNDING = 1e-12


class TakesNoListError(UsageError):
    """A grid of timesteps that diffusers' class cannot be told; our own table can."""


class _Float64(ModuleType):
    """A module whose float32 is float64."""

    def __init__(self, name: str, real: ModuleType, changes: dict[str, Any]) -> None:
        super().__init__(name)
        self._real, self._changes = real, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._real, name)


class _BrownianNoise:
    """Stands in for BrownianTreeNoiseSampler: exact increments of one Brownian motion in sigma, noise from ``draw``."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.pieces: list[tuple[float, float, Tensor]] = []
        self.like: Tensor | None = None

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        high, low = float(sigma), float(sigma_next)
        slack = ROUNDING * high  # a sigma comes back from its logarithm
        inside = [piece for piece in self.pieces if low - slack <= piece[1] and piece[0] <= high + slack]
        reached = min((piece[1] for piece in inside), default=high)
        if reached > low + slack:
            self.pieces.append((reached, low, self.draw(self.like)))
            inside.append(self.pieces[-1])
        assert self.like is not None
        total: Tensor = torch.zeros_like(self.like)
        for start, end, noise in inside:
            total = total + (start - end) ** 0.5 * noise
        return total / math.sqrt(high - low)


def _floor(number: Tensor) -> Tensor:
    """TCD floors (1 - eta) * timestep, a float32: 0.7 * 700 is 490 there, and just below in float64."""
    return torch.floor(number.to(torch.float32))


@contextmanager
def in_float64(module: ModuleType, draw: Draw) -> Iterator[None]:
    """Inside, ``module`` computes in float64 and takes its noise from ``draw(like)``."""
    changes: dict[str, Any] = {
        name: _Float64(name, getattr(module, name), wider) for name, wider in _WIDER.items() if hasattr(module, name)
    }
    randoms = {"randn_like": lambda like, **_: draw(like), "randn": lambda *_, **__: draw(None)}
    if "torch" in changes:
        changes["torch"]._changes |= randoms | {"floor": _floor}
    changes["randn_tensor"] = lambda *_, **__: draw(None)

    def brownian(x: Tensor, *_: Any, **__: Any) -> _BrownianNoise:
        noise = _BrownianNoise(draw)
        noise.like = x
        return noise

    changes["BrownianTreeNoiseSampler"] = brownian
    changes = {name: value for name, value in changes.items() if hasattr(module, name)}
    before, dtype = {name: getattr(module, name) for name in changes}, torch.get_default_dtype()
    try:
        for name, value in changes.items():
            setattr(module, name, value)
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for name, value in before.items():
            setattr(module, name, value)


def scheduler_class(name: str) -> Any:
    """The class in diffusers' own module; raises NotAvailableError if diffusers lacks it."""
    diffusers = import_diffusers()
    found = getattr(diffusers, name, None)
    module_name = getattr(found, "__module__", "")
    if module_name.startswith("diffusers.schedulers."):
        return found
    if name == "DPMSolverSDEScheduler":  # hidden without torchsde, of which only the noise is used, replaced here
        sys.modules.setdefault("torchsde", ModuleType("torchsde"))
        return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), name)
    raise NotAvailableError(f"scheduler {name}: diffusers {diffusers.__version__} has no such class; upgrade diffusers")


class DiffusersLoop:
    """One scheduler of diffusers, its timesteps set, and the loop over them. Use inside ``in_float64``'s reach only.

    Args:
        config: class, settings and grid.
        steps: num_inference_steps.
        draw: where noise comes from.
        eta: of ``step``, for DDIM and TCD.
    """

    def __init__(self, config: SchedulerConfig, steps: int, draw: Draw, eta: float | None = None) -> None:
        chosen = scheduler_class(config.class_name)
        self.config, self.draw = config, draw  # ``draw`` may be exchanged between calls
        self.module = sys.modules[chosen.__module__]
        known = inspect.signature(chosen.__init__).parameters
        settings = {key: _as_diffusers(value) for key, value in config.settings().items()}
        if config.is_given_grid:
            settings["timestep_spacing"] = config.named_spacing.replace("mmd-ddm", "leading") or "leading"
        if config.sampler == "ddim" and config.beta_schedule == "sigmoid":  # DDPMScheduler's alone in diffusers
            settings |= {"beta_schedule": "linear", "trained_betas": betas(config)}
        if config.timestep_spacing == "mmd-ddm":
            settings["set_alpha_to_one"] = True  # as in MMD-DDM's own loop
        settings = {key: value for key, value in settings.items() if key in known}  # older diffusers know fewer
        with in_float64(self.module, self._draw):
            try:
                self.scheduler = chosen(**settings)
                self._set_timesteps(steps)
            except (ValueError, NotImplementedError, AssertionError, IndexError) as error:
                raise UsageError(
                    f"scheduler {config.class_name}: diffusers refuses it: {_first_line(error)}"
                ) from error
        self.options = {} if eta is None else {"eta": eta}

    def _draw(self, like: Any) -> Tensor:
        return self.draw(like)

    def _set_timesteps(self, steps: int) -> None:
        """A grid of diffusers, or the listed one where its class takes a list."""
        listed = self.config.is_given_grid
        told = {"mu": self.config["mu"]} if self.config.get(DYNAMIC) else {}
        if self.config.sampler == "scm" and steps != 2:
            self.scheduler.set_timesteps(steps, intermediate_timesteps=None)  # its default belongs to 2 steps
        elif not listed:
            self.scheduler.set_timesteps(steps, **told)
            self._drop_rounding_step(steps)
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            given = self.config.custom_timesteps or timestep_grid(self.config, steps)
            self.scheduler.set_timesteps(timesteps=list(given), **told)
        elif self.config.timestep_spacing == "mmd-ddm" and self.config.sampler == "ddim":
            self.scheduler.set_timesteps(steps)  # its previous timestep is t - T // K, which is MMD-DDM's
            self.scheduler.timesteps = torch.tensor(timestep_grid(self.config, steps))
        else:
            option = "--timesteps" if self.config.custom_timesteps else f"--spacing {self.config.timestep_spacing}"
            raise TakesNoListError(
                f"{option} lists timesteps; diffusers' {self.config.class_name} takes none of its own"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # a first timestep that comes up twice is the first all the same

    def _drop_rounding_step(self, steps: int) -> None:
        """Where a trailing grid gains one step by rounding, leave it out, as mmd_export.schedule does."""
        found = self.scheduler.timesteps
        if self.config.timestep_spacing != "trailing" or len(found) != steps + 1 or self.scheduler.order != 1:
            return
        if self.config.sampler in ("pndm", "heun", "dpmsolver-sde"):
            return
        self.scheduler.timesteps, self.scheduler.num_inference_steps = found[:steps], steps
        if hasattr(self.scheduler, "sigmas") and len(self.scheduler.sigmas) == steps + 2:
            self.scheduler.sigmas = torch.cat([self.scheduler.sigmas[:steps], self.scheduler.sigmas[-1:]])

    @property
    def timesteps(self) -> list[float]:
        """One a network call."""
        return [float(t) for t in self.scheduler.timesteps]

    @property
    def calls(self) -> int:
        """Network calls; some classes list a last timestep at which the network is not called."""
        return len(self.scheduler.timesteps) - (self.config.sampler == "scm")

    @property
    def initial_scale(self) -> float:
        """What unit noise is multiplied by."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scaled(self, k: int, x: Tensor) -> Tensor:
        """What the network sees of state ``x`` at call k."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        with in_float64(self.module, self._draw):
            scaled: Tensor = self.scheduler.scale_model_input(x, self.scheduler.timesteps[k])
        return scaled

    def step(self, k: int, output: Tensor, x: Tensor) -> Tensor:
        """The state after call k."""
        with in_float64(self.module, self._draw):
            after: Tensor = self.scheduler.step(output, self.scheduler.timesteps[k], x, **self.options).prev_sample
        return after


class SprintLoop(DiffusersLoop):
    """SCMScheduler around a network F of flow, as diffusers' SanaSprintPipeline calls both; arXiv 2503.09641.

    sigma = sin t / (cos t + sin t); F sees rho x with rho^2 = sigma^2 + (1 - sigma)^2, and the scheduler gets
    ((1 - 2 sigma) rho x + rho^2 F) / rho. States are in units of ``sigma_data``: they start and end as the pipeline's.
    """

    @property
    def timesteps(self) -> list[float]:
        """The sigma of each call, which is what F is told."""
        return [math.sin(t) / (math.cos(t) + math.sin(t)) for t in super().timesteps]

    def scaled(self, k: int, x: Tensor) -> Tensor:
        """The state at the level (1 - sigma, sigma)."""
        return self._rho(k) * x

    def step(self, k: int, output: Tensor, x: Tensor) -> Tensor:
        """The state after call k."""
        sigma, rho, unit = self.timesteps[k], self._rho(k), float(self.config["sigma_data"])
        of_trigflow = ((1.0 - 2.0 * sigma) * self.scaled(k, x) + rho**2 * output) / rho
        return super().step(k, unit * of_trigflow, unit * x) / unit

    def _rho(self, k: int) -> float:
        return math.hypot(self.timesteps[k], 1.0 - self.timesteps[k])


def loop_of(config: SchedulerConfig, steps: int, draw: Draw, eta: float | None = None) -> DiffusersLoop:
    """The loop of diffusers' pipeline for the config; arguments of ``DiffusersLoop``."""
    kind = SprintLoop if config.get("of_flow") else DiffusersLoop
    return kind(config, steps, draw, eta)


def chain(
    loop: DiffusersLoop,
    network: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    step_noise: Sequence[Sequence[Tensor]],
) -> Iterator[Tensor]:
    """Every state of diffusers' loop over ``network(x, k)``; call k draws ``step_noise[k]`` in order, then zeros."""
    x = noise * loop.initial_scale
    for k in range(loop.calls):
        left = list(step_noise[k])
        loop.draw = lambda _, left=left: left.pop(0) if left else torch.zeros_like(noise)  # type: ignore[misc]
        x = loop.step(k, network(loop.scaled(k, x), k), x)
        yield x


def _as_diffusers(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
