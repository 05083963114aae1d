"""Modules of a user, good and bad, for ``python:tests.foreign_nets:NAME``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VELOCITY: dict[str, Any] = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


class Plain(nn.Module):
    """Two convolutions and a linear time embedding."""

    sample_shape = (1, 8, 8)
    scheduler_config = VELOCITY

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
            self.time = nn.Linear(1, 8)

    def features(self, x: Tensor, timestep: Tensor) -> Tensor:
        """(B, 8, 8, 8)."""
        time: Tensor = self.time(timestep.to(x.dtype).reshape(1, 1) / 1000)
        features: Tensor = F.silu(self.first(x) + time.reshape(1, 8, 1, 1))
        return features

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.last(self.features(x, timestep))
        return output


class Residual(Plain):
    """Its sum adds what the first product gave to what was made of it; transposed at both ends, a shift behind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(13)
            self.first = nn.ConvTranspose2d(1, 8, 3, padding=1)  # type: ignore[assignment]
            self.inner = nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.ConvTranspose2d(8, 1, 3, padding=1)  # type: ignore[assignment]
            self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x)
        inner = self.inner(h).reshape(x.shape[0], 8, 8, 8)  # reads the size of the state, not the state
        h = h + torch.tanh(inner + self.time(timestep.to(x.dtype).reshape(1, 1) / 1000).reshape(1, 8, 1, 1))
        output: Tensor = self.last(torch.sigmoid(h + self.shift.reshape(1, 8, 1, 1)))
        return output


class Skip(Plain):
    """What the first convolution gives lives until it is added behind the second."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(14)
            self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.features(x, timestep)
        output: Tensor = self.last(F.silu(h + torch.tanh(self.inner(h))))
        return output


class Added(Plain):
    """A residual sum within a product: what is added is read by another layer too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(15)
            self.inner, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.features(x, timestep).permute(0, 2, 3, 1).reshape(-1, 8)
        h = torch.addmm(h, torch.tanh(self.inner(h)), self.weight)
        output: Tensor = self.last(h.reshape(-1, 8, 8, 8).permute(0, 3, 1, 2))
        return output


class TiedFirst(Plain):
    """The weight of the first convolution is that of an inner one too."""

    sample_shape = (8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(16)
            self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.last(F.silu(self.first(self.features(x, timestep))))
        return output


class TiedLast(TiedFirst):
    """The weight of the last one."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.last(F.silu(self.last(self.features(x, timestep))))
        return output


class Labelled(Plain):
    """Adds the label's own constant."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(12)
            self.label = nn.Embedding(4, 1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
        row: Tensor = self.label(class_labels).reshape(-1, 1, 1, 1)
        return super().forward(x, timestep) + row


class Told(Labelled):
    """Moved by a text behind a mask too, on latents, which are not clamped."""

    sample_shape = (4, 8, 8)
    scheduler_config = {**VELOCITY, "clip_sample": False}  # noqa: RUF012 - plain dicts are what users write
    latent = True
    conditions = {  # noqa: RUF012
        "encoder_hidden_states": (3, 6),
        "encoder_attention_mask": {"dtype": "int64", "shape": (3,), "below": 2},
    }

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(14)
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
            self.text = nn.Linear(6, 4)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        encoder_attention_mask: Tensor,
        encoder_hidden_states: Tensor,
    ) -> Tensor:
        words: Tensor = self.text(encoder_hidden_states) * encoder_attention_mask.to(x.dtype).unsqueeze(-1)
        return super().forward(x, timestep, class_labels) + words.sum(1).reshape(-1, 4, 1, 1)


class ToldEnergy(Told):
    """Its gradient step."""

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, **text: Tensor) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            energy = (Told.forward(self, at, timestep, class_labels, **text) ** 2).sum()
            return torch.autograd.grad(energy, at)[0]


class EdmRawNet(Plain):
    """F of an EDM network: it is told log(sigma) / 4."""

    scheduler_config = {"_class_name": "EDMEulerScheduler"}  # noqa: RUF012

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(super().forward(x, 1000 * timestep))


class EdmNet(EdmRawNet):
    """D around the same F, as Karras et al. 2022 write it; sigma (1,)."""

    preconditioned = True

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        sigma = timestep.to(x.dtype).reshape(-1, 1, 1, 1)
        total = sigma**2 + 0.25
        raw = super().forward(x / total.sqrt(), sigma.log().flatten() / 4)
        return 0.25 / total * x + 0.5 * sigma / total.sqrt() * raw


class EdmOfAnother(EdmNet):
    scheduler_config = VELOCITY


class Energy(Plain):
    """E(x, t), summed over the batch; what is sampled with is its gradient."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(13)
            self.norm, self.pooled = nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3, stride=2, padding=1)
            self.attention = nn.Linear(6, 18)
            self.register_buffer("weight", torch.rand(6))

    def energy(self, x: Tensor, timestep: Tensor) -> Tensor:
        """A convolution with a stride, a group norm and attention, so that their gradients are in it."""
        h = torch.tanh(self.pooled(self.norm(self.features(x, timestep))))
        q, k, v = self.attention(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v)
        return (h**2 * self.get_buffer("weight")).sum() + 0.5 * (x**2).sum()


class AutogradEnergy(Energy):
    """The gradient as torch's documentation writes it."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.energy(at, timestep), at)[0]


class FunctionalEnergy(Energy):
    """The same gradient by torch.func."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda at: self.energy(at, timestep))(x)
        return gradient


class LabelledEnergy(Energy):
    """A gradient that depends on labels too."""

    num_classes = 3

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
        scale = 1.0 + class_labels.to(x.dtype).reshape(-1, 1, 1, 1)
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.energy(scale * at, timestep), at)[0]


class MeanEnergy(Energy):
    """Averaged over the batch, so one sample's gradient depends on how many there are."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda at: self.energy(at, timestep) / len(at))(x)
        return gradient


class Leading(Plain):
    """Takes something of the first sample from all, which the first one alone does not show."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) - x[:1].mean()


class Noisy(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) + torch.randn_like(x)


class OwnNoise(Plain):
    """A generator of its own, so torch's global state does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) + torch.randn(x.shape, generator=self.generator)


class Branching(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x, timestep)
        return x


class TimeBranching(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x if int(timestep) > 500 else super().forward(x, timestep)


class Selecting(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) * x[x > 0].shape[0]


class NumpyNet(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2) + super().forward(x, timestep)


class Counting(Plain):
    """Keeps state."""

    calls = 0

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, timestep) * self.calls


class SingleOnly(Plain):
    """Does not run in float64."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x.float(), timestep)


class Doubled(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep).repeat(1, 2, 1, 1)


class Tupled(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(x, timestep),)


class Failing(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(super().forward(x, timestep))  # type: ignore[no-any-return]


class Infinite(Plain):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) / 0


class Shapeless(Plain):
    sample_shape = None  # type: ignore[assignment]


class OddClasses(Plain):
    num_classes = "ten"


class OddLatent(Plain):
    latent = "yes"


class OddCondition(Plain):
    conditions = {"text": (3, "wide")}  # noqa: RUF012


class TakenCondition(Plain):
    conditions = {"noise": (3,)}  # noqa: RUF012


class UnusedCondition(Plain):
    conditions = {"text": (3, 6)}  # noqa: RUF012


class Disagreeing(Plain):
    prediction_type = "epsilon"


class OddScheduler(Plain):
    scheduler_config = {**VELOCITY, "beta_schedule": "quadratic"}  # noqa: RUF012 - a plain dict is what users write


class Unscheduled(Plain):
    scheduler_config = None  # type: ignore[assignment]


class Damaged(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first.weight.data[0] = torch.nan


def make_plain() -> nn.Module:
    """A factory; half precision, in training mode, as it may come from a trainer."""
    return Plain().half().train()


def needs_arguments(width: int) -> nn.Module:
    return nn.Conv2d(width, width, 1)


def makes_a_number() -> int:
    return 3


network = Plain()
number = 3


class Bessel(Plain):
    """An operator of torch that few compilers know."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(x), timestep)


class Inverse(Plain):
    """An operator that checks its operand: an effect beside its result."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(torch.linalg.inv(x), timestep)


@torch.library.custom_op("foreign_nets::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator of this test alone."""
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(Plain):
    """An operator that torch has not."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(twice(x), timestep)
