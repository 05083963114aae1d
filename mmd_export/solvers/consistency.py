"""Samplers of distilled few-step models: LCM, TCD and consistency models."""

from __future__ import annotations

import math
import struct

from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, alphas_cumprod, check_steps, timestep_grid
from mmd_export.solvers.levels import Affine, Level, clean_guess, noise_guess
from mmd_export.solvers.table import Form, Table

LCM_SIGMA_DATA = 0.5


def _distilled_grid(config: SchedulerConfig, steps: int) -> list[int]:
    """``steps`` of the ``original_inference_steps`` of the distillation, evenly picked from the noisy end."""
    check_steps(config, steps)
    if config.is_given_grid:
        return list(timestep_grid(config, steps))
    total, original = config.num_train_timesteps, config["original_inference_steps"]
    if not steps <= original <= total:
        raise UsageError(
            f"--steps is {steps}, original_inference_steps {original}, num_train_timesteps {total}; they must not fall"
        )
    trained = [i * (total // original) - 1 for i in range(original, 0, -1)]
    return [trained[math.floor(i * (original / steps))] for i in range(steps)]


def _form(guess: Affine, x: Form, output: Form) -> Form:
    return guess.state * x + guess.output * output


def lcm(config: SchedulerConfig, steps: int) -> StepPlan:
    """f = c_skip x + c_out x0, then noise for the next level; Luo et al. 2023 (arXiv 2310.04378), eq. 9, alg. 3."""
    alpha_bar, grid = alphas_cumprod(config), _distilled_grid(config, steps)
    table = Table(config.clip_sample_range if config.clip_sample else None)
    for k, timestep in enumerate(grid):
        level = Level(alpha_bar[timestep])
        x, output = table.call(timestep, level.alpha, level.sigma)
        x0 = table.clean(_form(clean_guess(level, config.prediction_type, timestep), x, output))
        scaled, data = timestep * config["timestep_scaling"], LCM_SIGMA_DATA
        c_skip, c_out = data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
        denoised = c_out * x0 + c_skip * x
        if k + 1 < len(grid):
            after = Level(alpha_bar[grid[k + 1]])
            denoised = after.alpha * denoised + table.noise(after.sigma)
        table.advance(denoised)
    return table.plan("lcm", config, steps)


def tcd(config: SchedulerConfig, steps: int, eta: float = 0.3) -> StepPlan:
    """DDIM to s = (1 - eta) t', then noise up to t'; Zheng et al. 2024 (arXiv 2402.19159), alg. 4, eta is gamma."""
    if not 0.0 <= eta <= 1.0:
        raise UsageError(f"--eta is {eta}; TCD's gamma lies in 0 ... 1")
    alpha_bar, grid = alphas_cumprod(config), _distilled_grid(config, steps)
    table = Table()
    for k, timestep in enumerate(grid):
        level, last = Level(alpha_bar[timestep]), k + 1 == len(grid)
        after = 0 if last else grid[k + 1]
        inner = Level(alpha_bar[math.floor(_float32(_float32(1.0 - eta) * after))])  # in float32, as torch floors it
        x, output = table.call(timestep, level.alpha, level.sigma)
        x0 = _form(clean_guess(level, config.prediction_type, timestep), x, output)
        eps = _form(noise_guess(level, config.prediction_type, timestep), x, output)
        state = inner.alpha * x0 + inner.sigma * eps
        if eta > 0.0 and not last:
            ratio = alpha_bar[after] / inner.alpha_bar
            state = math.sqrt(ratio) * state + table.noise(math.sqrt(1.0 - ratio))
        table.advance(state)
    return table.plan("tcd", config, steps, settings={"eta": eta})


def _float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


def consistency(config: SchedulerConfig, steps: int) -> StepPlan:
    """f = c_skip x + c_out F, then noise for the next level; Song et al. 2023 (arXiv 2303.01469), eq. 5, alg. 1."""
    total, low, high, data = (config[key] for key in ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data"))
    check_steps(config, steps)
    grid = config.custom_timesteps or tuple(i * (total // steps) for i in reversed(range(steps)))
    a, b, rho = high ** (1.0 / config["rho"]), low ** (1.0 / config["rho"]), config["rho"]
    sigmas = [(a + t / (total - 1) * (b - a)) ** rho for t in reversed(grid)]
    table = Table(1.0 if config["clip_denoised"] else None)
    for k, sigma in enumerate(sigmas):
        scale = 1.0 / math.sqrt(sigma**2 + data**2)
        x, output = table.call(250.0 * math.log(sigma + 1e-44), data * scale, sigma * scale, scale)
        gap = sigma - low
        c_skip, c_out = data**2 / (gap**2 + data**2), gap * data * scale
        denoised = table.clean(c_skip * x + c_out * output)
        after = min(max(sigmas[k + 1] if k + 1 < len(sigmas) else low, low), high)
        std = math.sqrt(after**2 - low**2) if len(grid) > 1 else 0.0
        table.advance(denoised + table.noise(config["s_noise"] * std))
    return table.plan("consistency", config, steps, prediction="edm", initial_scale=high)
