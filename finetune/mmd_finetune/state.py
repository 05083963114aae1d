"""What changes during a run, and its one file: weights, average, best, Adam moments, counters."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmd_export.errors import UsageError, one_line
from mmd_finetune.files import write_atomically
from mmd_finetune.trainable import Trainable, parameter_groups
from mmd_finetune.world import World


@dataclass(frozen=True)
class Progress:
    """Counters and distances, JSON-ready: ``iteration`` are done; distances are held-out ones of the average.

    ``unmeasured``: what the last iteration adds to the log, if its evaluation is still due.
    """

    iteration: int
    first_distance: float
    best_distance: float
    best_iteration: int
    seconds: float
    unmeasured: dict[str, Any] | None = None


class TuningState:
    """The network that is tuned, its average, the best average, and the optimiser.

    Args:
        base: what is tuned, or a plain denoiser, all of which is; it is copied and never changed.
        learning_rate: of Adam (Kingma and Ba 2015), beta 0.9 and 0.999, no weight decay; ``plan_learning_rate`` is
            that of the plan's numbers.
    """

    def __init__(self, base: nn.Module, learning_rate: float, plan_learning_rate: float | None = None) -> None:
        tuned = base if isinstance(base, Trainable) else copy.deepcopy(base).requires_grad_(True)
        # eval: dropout would add noise that the shipped graph does not have.
        self.denoiser = copy.deepcopy(tuned).eval()
        self.average = copy.deepcopy(base).eval().requires_grad_(False)
        self.best = self.snapshot()
        self.parameters = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.denoiser, learning_rate, plan_learning_rate or learning_rate)
        self.optimiser = torch.optim.Adam(groups, lr=learning_rate, fused=True)
        self.progress: Progress | None = None
        self.is_whole = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """``is_whole`` no longer holds if the block, a step of the optimiser, breaks off."""
        self.is_whole = False
        yield
        self.is_whole = True

    def update_average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the average's weights."""
        return {name: tensor.detach().clone() for name, tensor in self.average.state_dict().items()}

    @property
    def is_finite(self) -> bool:
        """No weight, average or moment is NaN or infinite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._tensors().values())

    def save(self, path: Path) -> None:
        """Write everything into one file, whole or not at all; raises OSError."""
        assert self.progress is not None, "a run is saved after its first evaluation"
        metadata = {"progress": json.dumps(vars(self.progress))}
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self._tensors().items()}
        write_atomically(path, save(tensors, metadata))

    def load(self, path: Path, world: World | None = None) -> Self:
        """Continue where ``save`` stopped; raises UsageError if the file is damaged.

        Of several processes the first one reads, so the others need not see its disk.
        """

        def read() -> tuple[dict[str, Tensor], Progress]:
            with _readable(path):
                return _read(path)

        tensors, progress = (world or World()).first_does(read)
        with _readable(path):
            self._restore(tensors, progress)
        return self

    def _tensors(self) -> dict[str, Tensor]:
        groups: dict[str, dict[str, Any]] = {
            "weights": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best,
        }
        for moment in ("exp_avg", "exp_avg_sq"):
            groups[moment] = {
                name: self.optimiser.state[parameter][moment]
                for name, parameter in self.parameters.items()
                if moment in self.optimiser.state[parameter]
            }
        return {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}

    def _restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = tensor
        self.denoiser.load_state_dict(groups["weights"])
        self.average.load_state_dict(groups["average"])
        self.best = {name: tensor.clone() for name, tensor in groups["best"].items()}
        moments = groups.get("exp_avg", {})  # of the parameters that have had a gradient
        for name, parameter in ((name, self.parameters[name]) for name in moments):
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(progress.iteration), device=parameter.device),
                # In the memory format of the parameter, as Adam makes them: the order of rounding depends on it.
                "exp_avg": torch.empty_like(parameter).copy_(moments[name]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(groups["exp_avg_sq"][name]),
            }
        self.progress = progress

    def share(self, world: World) -> None:
        """Give every process what the first one holds."""
        world.copy_first((*self.denoiser.state_dict().values(), *self.average.state_dict().values()))
        self.best = self.snapshot()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """UsageError for a state that is damaged or of another network."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"state {path} cannot be read ({one_line(error)}); remove the run folder and start again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], Progress]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, Progress(**json.loads(file.metadata()["progress"]))
