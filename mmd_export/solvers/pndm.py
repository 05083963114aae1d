"""PNDM: pseudo Runge-Kutta and pseudo linear multistep; Liu et al. 2022 (arXiv 2202.09778)."""

from __future__ import annotations

import math

from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, alphas_cumprod, timestep_grid
from mmd_export.solvers.levels import Level
from mmd_export.solvers.table import Form, Table

ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
PRK_STEPS = 3


def pndm(config: SchedulerConfig, steps: int) -> StepPlan:
    """diffusers' PNDMScheduler: 12 Runge-Kutta calls (unless ``skip_prk_steps``), then Adams-Bashforth of order 4.

    K + 9 network calls for K steps with the Runge-Kutta start, K + 1 without.
    """
    return _Pndm(config, steps).plan()


class _Pndm:
    def __init__(self, config: SchedulerConfig, steps: int) -> None:
        if config.is_given_grid:
            raise UsageError(
                "--timesteps and --spacing mmd-ddm: PNDM's multistep formula needs diffusers' own even grid"
            )
        self.config, self.steps = config, steps
        self.alpha_bar = alphas_cumprod(config)
        self.gap = config.num_train_timesteps // steps
        self.grid = timestep_grid(config, steps)
        self.table = Table()
        self.history: list[Form] = []  # eps or v, the newest first

    def plan(self) -> StepPlan:
        rest = self._two_point_start() if self.config["skip_prk_steps"] else self._runge_kutta()
        for timestep in rest:
            x, output = self._call(timestep)
            self.history.insert(0, output)
            self._advance(x, timestep, timestep - self.gap, self._extrapolated())
        start = not self.config["skip_prk_steps"]
        return self.table.plan("pndm", self.config, self.steps, settings={"runge_kutta_start": start})

    def _call(self, timestep: int) -> tuple[Form, Form]:
        level = self._level(timestep)
        return self.table.call(timestep, level.alpha, level.sigma)

    def _level(self, timestep: int) -> Level:
        if timestep < 0:
            return Level(1.0 if self.config.set_alpha_to_one else self.alpha_bar[0])
        return Level(self.alpha_bar[timestep])

    def _extrapolated(self) -> Form:
        used = self.history[:4]
        total = Form()
        for weight, output in zip(ADAMS_BASHFORTH.get(len(used), (1.0,)), used, strict=True):
            total = total + weight * output
        return total

    def _advance(self, x: Form, start: int, end: int, output: Form) -> None:
        """x' = sqrt(a'/a) x - (a' - a) eps / (a sqrt(1 - a') + sqrt(a (1 - a) a')); eq. 11, a = alpha_bar."""
        level, goal = self._level(start), self._level(end)
        a, b = level.alpha_bar, goal.alpha_bar
        if self.config.prediction_type == "v_prediction":
            output = level.alpha * output + level.sigma * x
        divisor = a * goal.sigma + math.sqrt(a * level.variance * b)
        self.table.advance(math.sqrt(b / a) * x - ((b - a) / divisor) * output)

    def _two_point_start(self) -> tuple[int, ...]:
        """The first step twice: with its own output, then with the mean of both ends' outputs; the rest of the grid."""
        first = self.grid[0]
        x, output = self._call(first)
        self.history.insert(0, output)
        self._advance(x, first, first - self.gap, output)
        if len(self.grid) == 1:
            return ()
        second = self.grid[1]
        _, again = self._call(second)
        self._advance(x, second + self.gap, second, 0.5 * (again + output))
        return self.grid[1:]

    def _runge_kutta(self) -> tuple[int, ...]:
        """Three steps of four calls each at t, t - gap/2, t - gap/2, t - gap; the rest of the grid."""
        if self.steps <= PRK_STEPS:
            raise UsageError(
                f"--steps is {self.steps}: PNDM's Runge-Kutta start needs 4 or more; or set skip_prk_steps"
            )
        half = self.gap // 2
        for start, end in zip(self.grid[:PRK_STEPS], self.grid[1:], strict=False):
            visited = (start, end + half, end + half, end)
            total, origin = Form(), Form()
            for i, (timestep, weight) in enumerate(zip(visited, RUNGE_KUTTA, strict=True)):
                x, output = self._call(timestep)
                if i == 0:
                    origin = x
                    self.history.insert(0, output)
                total = total + weight * output
                goal = timestep - (half if i % 2 == 0 else 0)
                self._advance(origin, start, goal, total if i == 3 else output)
        return self.grid[PRK_STEPS:]
