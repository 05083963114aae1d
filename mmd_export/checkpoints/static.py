"""Foreign modules, tried out before any export: what branches on data, draws noise or keeps state is refused here."""

from __future__ import annotations

import copy
import inspect
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from mmd_export.conditions import CLASS_LABELS, Condition, names_of
from mmd_export.denoiser import timestep_tensor
from mmd_export.errors import UsageError

SAME = 1e-4  # float32 rounding in other orders of summation stays far below, a dependence on the batch far above
_TORCH = Path(inspect.getfile(torch)).parent
_HERE = Path(__file__).parent.parent


class _GradientWatch(TorchFunctionMode):
    """Notes whether a gradient is taken; torch.func.grad ends in torch.autograd.grad too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.seen = self.seen or func in (torch.autograd.grad, torch.Tensor.backward)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Signature:
    """What a foreign network takes: ``network(x, timestep[, class_labels], **others)``; ``shape`` is (C, H, W) of x.

    ``timestep``: the one that it is tried at.
    """

    shape: tuple[int, int, int]
    conditions: tuple[Condition, ...] = ()
    timestep: float = 500.0

    def examples(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Unit normal x from a generator of its own, a timestep (1,), and a value of every condition."""
        x = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        told = [torch.from_numpy(each.examples(i, batch)) for i, each in enumerate(self.conditions, start=1)]
        return x, timestep_tensor(self.timestep), *(y.to(dtype) if y.is_floating_point() else y for y in told)

    def named(self, told: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Values of the conditions as arguments: class labels by place, all others by name."""
        values = dict(zip(names_of(self.conditions), told, strict=True))
        labels = [values.pop(CLASS_LABELS)] if CLASS_LABELS in values else []
        return labels, values

    def call(self, network: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """What ``network`` returns for inputs in the order of ``examples``."""
        labels, others = self.named(inputs[2:])
        return network(*inputs[:2], *labels, **others)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, in the order of ``examples``."""
        return ("x", "timestep", *names_of(self.conditions))

    def __str__(self) -> str:
        return ", ".join(self.names)


def require_static(network: nn.Module, signature: Signature, where: str) -> bool:
    """Check that ``network`` is a pure function of its inputs that keeps samples apart; whether it takes a gradient.

    Raises UsageError with what it does instead, and the line of its code where that is known.
    """
    _require_plain(network, where)
    inputs = signature.examples(2)
    before = _random_states()
    first = call(network, signature, inputs, where)
    if before != _random_states():
        raise UsageError(f"{where} draws random numbers; only noise inputs may be random")
    for name, value, kept in zip(signature.names, inputs, signature.examples(2), strict=True):
        if not torch.equal(value, kept):
            raise UsageError(f"{where} writes into its input {name}; begin with a copy, {name} = {name}.clone()")
    # not before: what the module keeps of its first call, as tables of cosines, would be tensors without data
    takes_gradient = _shapes_alone_decide(network, signature, where)
    _require_image(first, inputs[0], signature.timestep, where)
    again = float((call(network, signature, inputs, where) - first).abs().max())
    if again > 0.0:
        raise UsageError(f"{where} draws noise or keeps state: two calls with the same input differ by {again:.2g}")
    mixed = max(_apart(network, signature, inputs, first, row, where) for row in range(len(first)))
    if mixed > SAME:
        raise UsageError(
            f"{where} mixes the samples of a batch: one sample alone differs by {mixed:.2g} of the largest output from "
            "the same one in a batch of two; sum over the batch, do not average"
        )
    _require_double(network, signature, where)
    return takes_gradient


def _require_plain(network: nn.Module, where: str) -> None:
    """Refuse what is compiled already: it cannot be captured, and a call without data may take the process with it."""
    for name, part in network.named_modules():
        at = f" ({name})" if name else ""
        if isinstance(part, torch.jit.ScriptModule):
            raise UsageError(f"{where} holds a TorchScript module{at}, which cannot be captured; give its Python class")
        if "_orig_mod" in part._modules:  # torch.compile's
            raise UsageError(f"{where} is compiled by torch.compile{at}; give the module without it")


def _apart(
    network: nn.Module, signature: Signature, inputs: tuple[Tensor, ...], whole: Tensor, row: int, where: str
) -> float:
    """How far sample ``row`` alone is from the same one in the batch, relative to the largest output."""
    one = slice(row, row + 1)
    alone = call(network, signature, (inputs[0][one], inputs[1], *(value[one] for value in inputs[2:])), where)
    return float((alone - whole[one]).abs().max() / whole.abs().max().clamp(min=1e-6))


def _shapes_alone_decide(network: nn.Module, signature: Signature, where: str) -> bool:
    """Run it on tensors without data: whatever asks for a value, and so could branch on it, raises."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [fake.from_tensor(value) for value in signature.examples(2)]
    watch = _GradientWatch()
    try:
        with fake, watch, torch.enable_grad():
            signature.call(network, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            f"{where} branches on data{_place(error)}: it reads a tensor's value; a static graph cannot, "
            "torch.where or a tensor operation can"
        ) from error
    except UnsupportedOperatorException as error:
        raise UsageError(f"{where} uses {error}, which has no shape rule, so it cannot be captured") from error
    except Exception as error:  # the module's own code may raise anything
        raise UsageError(_failed(where, signature, inputs, error)) from error
    return watch.seen


def call(network: nn.Module, signature: Signature, inputs: tuple[Tensor, ...], where: str) -> Tensor:
    """One call with gradients possible inside; any error in one line."""
    try:
        with torch.enable_grad():
            output = signature.call(network, inputs)
    except Exception as error:  # the module's own code may raise anything
        raise UsageError(_failed(where, signature, inputs, error)) from error
    if not isinstance(output, Tensor):
        raise UsageError(f"{where} returns {type(output).__name__}, not a tensor; return the prediction itself")
    return output.detach()


def _require_image(output: Tensor, x: Tensor, timestep: float, where: str) -> None:
    if output.shape != x.shape or output.dtype != x.dtype:
        found, wanted = f"{tuple(output.shape)} {output.dtype}", f"{tuple(x.shape)} {x.dtype}"
        raise UsageError(f"{where} returns {found} for x {wanted}; the same shape and type are expected")
    if not bool(torch.isfinite(output).all()):
        raise UsageError(f"{where} returns NaN or infinity for unit normal noise at timestep {timestep:g}")


def _require_double(network: nn.Module, signature: Signature, where: str) -> None:
    """The reference of every parity check is the network in float64."""
    inputs = signature.examples(1, torch.float64)
    try:
        output = call(copy.deepcopy(network).double(), signature, inputs, where)
    except UsageError as error:
        raise UsageError(f"{error}; the reference runs in float64, so cast to x.dtype, not to float32") from error
    _require_image(output, inputs[0], signature.timestep, where)


def _random_states() -> tuple[bytes, str, int]:
    """Of torch, numpy and Python."""
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), hash(random.getstate())  # noqa: NPY002 - the state of the old generator is what a module may draw from


def _failed(where: str, signature: Signature, inputs: Sequence[Tensor], error: Exception) -> str:
    if "numpy()" in str(error):
        return f"{where} leaves torch{_place(error)}: numpy code cannot be captured"
    shapes = ", ".join(f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in inputs)
    return f"{where} fails{_place(error)} on ({signature}) of {shapes}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """`` at FILE:LINE`` of the last line of foreign code that led to ``error``; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_file() and _TORCH not in file.parents and _HERE not in file.parents:
            return f" at {file.name}:{frame.lineno} ({frame.line})" if frame.line else f" at {file.name}:{frame.lineno}"
    return ""


@contextmanager
def gradients_possible() -> Iterator[None]:
    """Out of inference mode and no_grad, whatever the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
