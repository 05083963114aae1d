"""The processes of one run, as torchrun starts them: who I am, what we all know. Alone, every method is trivial."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mmd_export.errors import UsageError

Value = TypeVar("Value")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The first process encodes data sets and measures while the others wait; torch gives up after 10 minutes (NCCL).
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes; each works on its share of a batch and holds the whole network."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """This process writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The part of ``range(count)`` that is mine: in the order of the ranks, sizes differ by at most one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows (n_r, ...) of all processes in the order of the ranks, (N, ...), and where mine begin."""
        if self.size == 1:
            return rows, 0
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(rows)], device=self.device))
        counts = [int(length) for length in lengths]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))  # all_gather takes tensors of one size
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole, sum(counts[: self.rank])

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes of a tensor of one shape; the same bits everywhere."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one message for each type."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.detach().contiguous()  # a broadcast needs one block of memory
            distributed.broadcast(sent, src=0)
            tensor.detach().copy_(sent)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([int(flag)], device=self.device)))

    def first_does(self, action: Callable[[], Value]) -> Value:
        """What ``action`` returns, or the error that it raises, in the first process; the others receive the same."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [_outcome(action) if self.is_first else None]
        distributed.broadcast_object_list(outcome, src=0)
        found: Value = _value(outcome[0])
        return found

    def together(self, action: Callable[[], Value]) -> Value:
        """Every process does it; if it fails in one, all raise the error of the lowest rank, so none waits for ever."""
        if self.size == 1:
            return action()
        own = _outcome(action)
        errors: list[BaseException | None] = [None] * self.size
        distributed.all_gather_object(errors, own if isinstance(own, Exception) else None)
        for error in errors:
            if error is not None:
                raise error
        found: Value = _value(own)
        return found


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """The processes that torchrun or ``accelerate launch`` started, or that the caller has joined already; else one.

    ``device`` is that of the settings. On CUDA every process takes the GPU of its LOCAL_RANK. Raises UsageError if the
    environment names several processes but not how they meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    joined = distributed.is_available() and distributed.is_initialized()
    if not joined and size > 1 and (missing := [name for name in NEEDED if name not in os.environ]):
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes by torchrun, or unset "
            "WORLD_SIZE for one"
        )
    if not joined and size == 1:
        yield World()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if not joined:
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        if not joined:
            distributed.destroy_process_group()


def is_first_process() -> bool:
    """For what is printed before and after a run: torchrun's RANK is 0 or not set."""
    return os.environ.get("RANK", "0") == "0"


def _outcome(action: Callable[[], Value]) -> Value | Exception:
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - it is raised again, in every process
        return error


def _value(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
