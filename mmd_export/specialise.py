"""Fold what a fixed time grid makes constant: the time path of the network is run once, here, not in the graph.

One network call is captured; the nodes that depend on the timestep but not on the state are evaluated for every step,
and the values that cross from them into the rest become small tables. It needs no knowledge of the architecture.
"""

from __future__ import annotations

import inspect
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mmd_export.denoiser import timestep_tensor, typical_timestep
from mmd_export.errors import UsageError, one_line
from mmd_export.free_batch import broadcasts, repeat_rows, slice_parts

STATE, TIMESTEP = "x", "timestep"
# Ops that broadcast their operands: before one of these a row that is equal for the whole batch is stored once.
_BROADCASTING = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.sub.Tensor}
# The arguments that switch training on, under the names of aten's schemas.
_TRAINING = ("train", "training")
_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}


class SpecialisedDenoiser(nn.Module):
    """A denoiser on a fixed grid, time path folded: ``forward(x, k, **conditions)``.

    ``body`` maps (x, *conditions, *constants of one step) to the raw output; ``tables[k]`` are those constants.
    """

    def __init__(self, body: fx.GraphModule, tables: Sequence[Sequence[Tensor]], names: Sequence[str] = ()) -> None:
        super().__init__()
        self.body = body
        self.names = tuple(names)
        self.constant_count = len(tables[0])
        for k, row in enumerate(tables):
            for i, value in enumerate(row):
                self.register_buffer(f"time_{k}_{i}", value)

    def constants(self, k: int) -> list[Tensor]:
        """The folded values of call ``k``."""
        return [self.get_buffer(f"time_{k}_{i}") for i in range(self.constant_count)]

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        """Raw output (B, C, H, W) of call ``k``."""
        output: Tensor = self.body(x, *(conditions[name] for name in self.names), *self.constants(k))
        return output


@dataclass(frozen=True)
class TimeSplit:
    """``time``: nodes evaluated here. ``crossing``: those of them that the rest of the graph uses."""

    time: set[fx.Node]
    crossing: list[fx.Node]


def specialise(
    denoiser: nn.Module,
    timesteps: Sequence[float],
    example: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    dynamic_batch: bool = False,
) -> SpecialisedDenoiser:
    """Capture one call of ``denoiser`` at ``example`` (B, C, H, W) and fold its time path for every timestep.

    ``conditions`` are examples of what the network is told besides, by name.

    Raises UsageError for a network that draws noise or trains, torch's export errors for one that cannot be captured
    (data-dependent branches).
    """
    given = dict(conditions or {})
    program = export_call(denoiser, typical_timestep(timesteps), example, given, dynamic_batch=dynamic_batch)
    return fold(program, timesteps, tuple(given))


def fold(program: ExportedProgram, timesteps: Sequence[float], names: tuple[str, ...]) -> SpecialisedDenoiser:
    """The captured call ``program`` with its time path folded for every timestep; UsageError if it is not static."""
    module = module_of(program)
    check_static(module.graph)  # before: noise in the time path would be folded into one constant draw
    split = split_time(module.graph)
    dtype = timestep_tensor(typical_timestep(timesteps)).dtype  # one graph serves all calls, so one type does
    tables = [_evaluate(module, split, timestep, dtype) for timestep in timesteps]
    tables = _store_equal_rows_once(split, tables)
    return SpecialisedDenoiser(_body(module, split, names), tables, names)


class _InOrder(nn.Module):
    """A denoiser with its conditions by place: torch.export 2.13 mixes up the shapes of what comes through ``**``."""

    def __init__(self, denoiser: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        output: Tensor = self.denoiser(x, timestep, **dict(zip(self.names, conditions, strict=True)))
        return output


@contextmanager
def any_batch(what: str) -> Iterator[None]:
    """Tell what to do where torch.export takes the batch size of ``what``, which should be free, for a constant."""
    from torch._dynamo.exc import UserError, UserErrorType

    try:
        yield
    except UserError as error:
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        raise UsageError(
            f"torch {torch.__version__} captures the {what} for one batch size only: {one_line(error)}; build a bundle "
            "of one size, as --batch 1, or with a newer torch"
        ) from error


def capture(
    denoiser: nn.Module, timestep: float, example: Tensor, conditions: Mapping[str, Tensor], *, dynamic_batch: bool
) -> fx.GraphModule:
    """One call of ``denoiser`` on (x, timestep, *conditions) as a graph of aten ops, without its assertions."""
    return module_of(export_call(denoiser, timestep, example, conditions, dynamic_batch=dynamic_batch))


def export_call(
    denoiser: nn.Module, timestep: float, example: Tensor, conditions: Mapping[str, Tensor], *, dynamic_batch: bool
) -> ExportedProgram:
    """The same as torch.export gives it; UsageError where it takes a free batch for a constant."""
    free = {0: torch.export.Dim.DYNAMIC} if dynamic_batch else None
    call = inspect.signature(denoiser.forward)
    network, given = denoiser, (example, timestep_tensor(timestep, example.device))
    # only where it must be wrapped: the names of weights would start with `denoiser.`, and tuning finds them by name
    if conditions and any(each.kind is each.VAR_KEYWORD for each in call.parameters.values()):
        network, inputs = _InOrder(denoiser, conditions), (*given, *conditions.values())
    else:
        inputs = tuple(call.bind(*given, **conditions).arguments.values())
    bound = inspect.signature(network.forward).bind(*inputs).arguments
    shapes = {
        name: None if name == TIMESTEP else (free,) * len(value) if isinstance(value, tuple) else free
        for name, value in bound.items()
    }
    with torch.no_grad(), any_batch("network"):
        return torch.export.export(network, inputs, dynamic_shapes=shapes, strict=False)


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """Its graph as a module, without assertions and what does nothing."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in reversed(module.graph.nodes):
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.squeeze.dim and _keeps_shape(node):
            node.replace_all_uses_with(node.args[0])
    slice_parts(module.graph, next(node for node in module.graph.nodes if node.name == STATE))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _keeps_shape(node: fx.Node) -> bool:
    """A squeeze of a dimension that is not 1 does nothing; torch.onnx 2.13 makes a Squeeze of it that ONNX refuses."""
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return before is not None and after is not None and before.dim() == after.dim()


def split_time(graph: fx.Graph) -> TimeSplit:
    """Separate what depends on the timestep alone; a shape of the state is not a dependence on the state."""
    on_state: set[fx.Node] = set()
    on_time: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            (on_time if node.name == TIMESTEP else on_state).add(node)
        elif node.target is not torch.ops.aten.sym_size.int:
            if any(parent in on_state for parent in node.all_input_nodes):
                on_state.add(node)
            if any(parent in on_time for parent in node.all_input_nodes):
                on_time.add(node)
    time = on_time - on_state
    crossing = [
        node for node in graph.nodes
        if node in time and node.op != "placeholder" and any(user not in time for user in node.users)
    ]  # fmt: skip
    return TimeSplit(time, crossing)


class _TimeInterpreter(fx.Interpreter):
    """Runs only what the crossing values need, for a batch of one."""

    def __init__(self, module: fx.GraphModule, split: TimeSplit, timestep: Tensor) -> None:
        super().__init__(module)
        self.split = split
        self.timestep = timestep
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of ``node``, evaluated on demand."""
        if node not in self.values:
            self.values[node] = self._evaluate(node)
        return self.values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.timestep
        if node.target is torch.ops.aten.sym_size.int:
            return 1
        if node.op == "get_attr":
            return self.fetch_attr(str(node.target))
        arguments = fx.map_arg(node.args, self.value)
        keywords = fx.map_arg(node.kwargs, self.value)
        return self.call_function(node.target, arguments, keywords)


def _evaluate(module: fx.GraphModule, split: TimeSplit, timestep: float, dtype: torch.dtype) -> list[Tensor]:
    device = next((p.device for p in module.parameters()), None)
    with torch.no_grad():
        interpreter = _TimeInterpreter(module, split, timestep_tensor(timestep, device).to(dtype))
        return [interpreter.value(node).detach().clone() for node in split.crossing]


def _store_equal_rows_once(split: TimeSplit, tables: list[list[Tensor]]) -> list[list[Tensor]]:
    """A static batch repeats the same row; keep one where every user broadcasts, or where the batch is free.

    A network that sees 2 B images (guidance) has two rows for one image, equal up to the order of summation.
    """
    columns = list(zip(*tables, strict=True))
    for i, node in enumerate(split.crossing):
        broadcast = all(user.target in _BROADCASTING for user in node.users if user not in split.time)
        equal = all(value.dim() > 1 and bool((value == value[:1]).all()) for value in columns[i])
        if _has_free_rows(node) or (equal and broadcast):
            columns[i] = tuple(value[:1].clone() for value in columns[i])
    return [list(row) for row in zip(*columns, strict=True)] if columns else tables


def _has_free_rows(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 1 and isinstance(value.shape[0], torch.SymInt)


def _body(module: fx.GraphModule, split: TimeSplit, names: tuple[str, ...]) -> fx.GraphModule:
    """The graph with inputs (x, *conditions, *crossing values) and the time path gone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    # in an order of our own; what came through ** is called conditions_<i>
    given = {STATE: placeholders[STATE]}
    given |= {name: placeholders.get(name) or placeholders[f"conditions_{i}"] for i, name in enumerate(names)}
    for name, node in given.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    for i, node in enumerate(split.crossing):
        copies[node] = graph.placeholder(f"time_{i}")
    repeated = repeat_rows(graph, copies[placeholders[STATE]], {node: copies[node] for node in split.crossing})
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(copies[node.args[0][0]])  # torch.export returns a tuple of one
        elif node not in copies and node not in split.time:
            seen = ChainMap({} if broadcasts(node) else repeated, copies)
            copies[node] = graph.node_copy(node, seen.__getitem__)
    graph.eliminate_dead_code()
    graph.lint()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copied get_attr nodes are checked by lint() above
        return fx.GraphModule(module, graph)


def check_static(graph: fx.Graph) -> None:
    """Refuse what must not be in a static graph: randomness, training-mode ops, control flow."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        given = _arguments(node)
        if any(given.get(switch) is True for switch in _TRAINING):
            raise UsageError(f"the network holds {name} in training mode; call .eval() on it")
        if _draws(node, given):
            raise UsageError(f"the network draws random numbers ({name}); only noise inputs may be random")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UsageError(f"the network holds control flow ({name}); a static graph has none")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an aten op is called with, by the names of its schema, defaults included; empty for other nodes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def _draws(node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether the op draws random numbers: torch tags all that may; dropout does so only where it is on."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    off = any(given.get(switch) is False for switch in _TRAINING) or given.get("dropout_p") == 0.0
    return not off
