"""What a run tunes, as one module: which weights, in which arithmetic, with the plan's numbers or without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mmd_export.checkpoint import Checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import NotAvailableError, UsageError, one_line
from mmd_export.plan import StepPlan
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.adapters import choose_weights, plain_weights
from mmd_finetune.learned_plan import LearnedSampler, PlanNumbers
from mmd_finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from mmd_finetune.emulation import Emulation

Form = Callable[[nn.Module], nn.Module]

RATE = "rate"  # of a parameter group: its learning rate over that of the weights


class Trainable(nn.Module):
    """A denoiser and a plan with gradients where the settings want them; copies are independent.

    ``requires_grad`` says what is tuned. ``emulation`` None computes in float32.
    """

    def __init__(
        self, network: nn.Module, plan: StepPlan, numbers: PlanNumbers | None = None, emulation: Emulation | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.start = plan
        self.numbers = numbers
        self.emulation = emulation

    def forward(self, x: Tensor, k: int, timestep: Tensor) -> Tensor:
        """Raw output (B, C, H, W) of call ``k`` at ``timestep`` (1,)."""
        if self.emulation is not None:
            return self.emulation.run(plain_weights(self.network), x, k, timestep)
        output: Tensor = self.network(x, timestep)
        return output

    def sampler(self, form: Form = lambda network: network, *, checkpoint_calls: bool = False) -> UnrolledSampler:
        """The whole chain; it reads weights and plan as they are when it runs.

        ``form`` gives a module that computes a network with its very parameters: compiled, in bfloat16.
        """
        if self.numbers is not None:
            return LearnedSampler(form(self), self.numbers, checkpoint_calls=checkpoint_calls)
        if self.emulation is None:
            calls: nn.Module = AtTimesteps(form(self.network), self.start.timesteps)
        else:
            calls = _Numbered(form(self), self.start.timesteps)
        return UnrolledSampler(calls, self.start, checkpoint_calls=checkpoint_calls)

    def plan(self) -> StepPlan:
        """The table as it is now."""
        return self.start if self.numbers is None else self.numbers.plan()

    def shipped(self, base: Checkpoint) -> Self:
        """A copy with the architecture of ``base``: what adapters learned is merged into the weights."""
        network = copy.deepcopy(base.denoiser).eval()
        found = plain_weights(self.network)  # with buffers that no file holds
        network.load_state_dict({name: found[name].detach() for name in network.state_dict()})
        made = type(self)(network, self.start, copy.deepcopy(self.numbers), self.emulation)
        return made.requires_grad_(False)


def parameter_groups(tuned: nn.Module, learning_rate: float, plan_learning_rate: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: the weights, then the plan's numbers at their own rate."""
    numbers = tuned.numbers if isinstance(tuned, Trainable) else None
    plan = [] if numbers is None else list(numbers.parameters())
    known = {id(parameter) for parameter in plan}
    weights = [p for p in tuned.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": weights, RATE: 1.0}] if weights else []
    return [*groups, {"params": plan, RATE: plan_learning_rate / learning_rate}] if plan else groups


class _Numbered(nn.Module):
    """``AtTimesteps`` for a network that asks which call it is."""

    def __init__(self, network: nn.Module, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.timesteps = timesteps

    def forward(self, x: Tensor, k: int) -> Tensor:
        timestep = torch.tensor([self.timesteps[k]], device=x.device)
        output: Tensor = self.network(x, k, timestep)
        return output


def make_emulation(base: Checkpoint, plan: StepPlan, settings: FinetuneSettings) -> Emulation | None:
    """The arithmetic that the settings want tuned; None is float32."""
    if settings.precision == "fp32":
        return None
    try:
        from mmd_finetune.emulation import emulate
    except ImportError as error:
        raise NotAvailableError(
            f"--precision {settings.precision} needs what builds the graph ({error}); "
            "pip install 'mmd-export[tune,onnx]'"
        ) from error
    return emulate(base, plan, settings.precision, settings.calibration, fractional=settings.learn == "plan")


def make_trainable(
    base: Checkpoint, plan: StepPlan, settings: FinetuneSettings, emulation: Emulation | None = None
) -> Trainable:
    """``base`` as the settings want it tuned, on the device where it is; ``base`` itself is not changed."""
    network = choose_weights(copy.deepcopy(base.denoiser).eval(), settings)
    numbers = None
    if settings.learn != "weights":
        last = base.scheduler.num_train_timesteps - 1
        numbers = PlanNumbers(plan, last, with_timesteps=settings.learn == "plan")
        numbers.to(next(base.denoiser.parameters()).device)
    return Trainable(network, plan, numbers, emulation)


def require_continuous_time(base: Checkpoint, plan: StepPlan) -> None:
    """Raise UsageError if the network's output does not change with the timestep smoothly: it cannot be learned."""
    device = next(base.denoiser.parameters()).device
    timestep = torch.tensor([plan.timesteps[0] + 0.5], device=device, requires_grad=True)
    try:
        output: Tensor = base.denoiser(torch.zeros(1, *base.shape, device=device), timestep)
        output.sum().backward(inputs=[timestep])
        reason = "the timestep carries no gradient" if timestep.grad is None else ""
    except (RuntimeError, TypeError, IndexError) as error:
        reason = one_line(error)
    if reason:
        raise UsageError(
            f"--learn plan: model {base.name} takes no timestep between whole ones ({reason}); use --learn coefficients"
        )


def clip_gradients(groups: Iterable[dict[str, Any]], limit: float) -> float:
    """Clip the norm of each parameter group to ``limit``; the norm of all of them before that.

    Each on its own: the plan's few numbers reach every pixel, and their gradient would drown that of the weights.
    """
    norms = [float(nn.utils.clip_grad_norm_(group["params"], limit)) for group in groups]
    return float(sum(norm**2 for norm in norms) ** 0.5)
