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
from mmd_export.free_batch import free_sizes, in_batches, repeat_rows, row_is_enough, slice_splits

STATE, TIMESTEP = "x", "timestep"
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


def specialise(program: ExportedProgram, timesteps: Sequence[float], names: Sequence[str] = ()) -> SpecialisedDenoiser:
    """The call that ``export_call`` captured, its time path folded for every timestep.

    ``names``: what the network is told besides. Raises UsageError for a network that draws noise or trains, and for one
    whose time path cannot be folded.
    """
    module = module_of(program)
    check_static(module.graph)  # before: noise in the time path would be folded into one constant draw
    dtype = timestep_tensor(typical_timestep(timesteps)).dtype  # one graph serves all calls, so one type does
    split, fixed = split_time(module.graph), dict[fx.Node, Any]()
    paths = [_TimePath(module, split, fixed, timestep, dtype) for timestep in timesteps]
    split = _without_mixed_rows(module.graph, split, paths)
    tables = _store_equal_rows_once(split, [[path.tensor(node) for node in split.crossing] for path in paths])
    return SpecialisedDenoiser(_body(module, split, tuple(names)), tables, names)


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
def quiet_copies() -> Iterator[None]:
    """Copies of a program say nothing. Delete when torch copies nothing that it deprecates itself (2.13: LeafSpec)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        yield


@contextmanager
def any_batch(what: str) -> Iterator[None]:
    """Tell what to do where torch.export takes the batch size of ``what``, which should be free, for a constant."""
    from torch._dynamo.exc import UserError, UserErrorType

    try:
        yield
    except UserError as error:
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        reason = one_line(error).split(" For more information")[0]
        raise UsageError(
            f"torch {torch.__version__} captures the {what} for one batch size only: {reason} Often len(x) or "
            "int(x.shape[0]) does that, and x.shape[0] does not; else build a bundle of one size, as --batch 1, or "
            "with a newer torch"
        ) from error


def capture(
    denoiser: nn.Module, timestep: float, example: Tensor, conditions: Mapping[str, Tensor], *, dynamic_batch: bool
) -> fx.GraphModule:
    """One call of ``denoiser`` on (x, timestep, *conditions) as a graph of aten ops, without its assertions."""
    return module_of(export_call(denoiser, timestep, example, conditions, dynamic_batch=dynamic_batch))


def export_call(
    denoiser: nn.Module, timestep: float, example: Tensor, conditions: Mapping[str, Tensor], *, dynamic_batch: bool
) -> ExportedProgram:
    """One call of ``denoiser`` at ``example`` (B, C, H, W), as torch.export captures it; functional where it must be.

    ``conditions`` are examples of what the network is told besides, by name. Raises UsageError where a free batch turns
    out to be a constant, torch's export errors for what cannot be captured (data-dependent branches).
    """
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
    with torch.no_grad(), any_batch("network"), warnings.catch_warnings():
        # Of torch 2.13: what a call leaves in an attribute. That two calls are the same was tried when it was loaded.
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
        program = torch.export.export(network, inputs, dynamic_shapes=shapes, strict=False)
    # what is written in place has no value of its own to fold
    with quiet_copies():
        return program.run_decompositions({}) if _writes_unseen(program) else program


def _writes_unseen(program: ExportedProgram) -> bool:
    """Whether state or time is written in place into what no state has been in: the split would not see it there."""
    weights = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    on_state, told = set[fx.Node](), set[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            told |= set() if node.name in weights else {node}
            on_state |= set() if node.name in (*weights, TIMESTEP) else {node}
        elif node.target is not torch.ops.aten.sym_size.int:
            told |= set() if told.isdisjoint(node.all_input_nodes) else {node}
            if node in told and _is_mutable(node) and node.args[0] not in on_state:
                return True
            on_state |= set() if on_state.isdisjoint(node.all_input_nodes) else {node}
    return False


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """Its graph as a module: without assertions and what does nothing, parts of a free batch as slices."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in reversed(module.graph.nodes):
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.squeeze.dim and _keeps_shape(node):
            node.replace_all_uses_with(node.args[0])
    slice_splits(module.graph, _inputs(module.graph)[STATE])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _keeps_shape(node: fx.Node) -> bool:
    """A squeeze of a dimension that is not 1 does nothing; torch.onnx 2.13 makes a Squeeze of it that ONNX refuses."""
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return before is not None and after is not None and before.dim() == after.dim()


def _inputs(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes if node.op == "placeholder"}


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
    return _split_at(graph, on_time - on_state)


def _split_at(graph: fx.Graph, time: set[fx.Node]) -> TimeSplit:
    return TimeSplit(
        time, [node for node in graph.nodes if node in time and any(user not in time for user in node.users)]
    )


class _TimePath(fx.Interpreter):
    """The values of what depends on the timestep alone, each computed when it is asked for, for a batch of one.

    ``fixed`` keeps what does not depend on it, for all timesteps.
    """

    def __init__(
        self, module: fx.GraphModule, split: TimeSplit, fixed: dict[fx.Node, Any], timestep: float, dtype: torch.dtype
    ) -> None:
        super().__init__(module)
        device = next((p.device for p in module.parameters()), None)
        self.timestep = timestep_tensor(timestep, device).to(dtype)
        self.time, self.values, self.fixed = split.time, dict[fx.Node, Any](), fixed

    def tensor(self, node: fx.Node) -> Tensor:
        """The value of ``node``; UsageError if it is none that a graph can be told."""
        with torch.no_grad():
            value = self._value(node)
        if not isinstance(value, Tensor):
            raise UsageError("the network reads the timestep as a Python number (item); compute with it as a tensor")
        return value.detach().clone()

    def _value(self, node: fx.Node) -> Any:
        values = self.values if node in self.time else self.fixed
        if node not in values:
            values[node] = self._compute(node)
        return values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.timestep
        if node.target is torch.ops.aten.sym_size.int:
            return 1
        if node.op == "get_attr":
            return self.fetch_attr(str(node.target))
        arguments = fx.map_arg(node.args, self._value)
        keywords = fx.map_arg(node.kwargs, self._value)
        return self.call_function(node.target, arguments, keywords)


def _without_mixed_rows(graph: fx.Graph, split: TimeSplit, paths: Sequence[_TimePath]) -> TimeSplit:
    """The split that leaves in the graph what has rows, where the batch is free, that differ within one image.

    As where the two halves of guidance add their classes to the time: how its rows go on for more images is in the
    operators that made it. So is how many there are, if that is no multiple of the batch. What those read is folded.
    """
    x = _inputs(graph)[STATE]
    time, nodes = set(split.time), list(split.crossing)
    while nodes:
        if (node := nodes.pop()) not in time:
            continue
        several = isinstance(node.meta.get("val"), (list, tuple))  # parts of what is left in the graph
        dims = free_sizes(node)
        alike = in_batches(node, x) and all(_is_one_row(path.tensor(node), dims) for path in paths if dims)
        if several or not alike:
            time.remove(node)
            nodes += [parent for parent in node.all_input_nodes if parent in time]
    return _split_at(graph, time)


def _store_equal_rows_once(split: TimeSplit, tables: list[list[Tensor]]) -> list[list[Tensor]]:
    """A free batch has one row for all, and a static one where that is enough for every user."""
    columns = list(zip(*tables, strict=True))
    equal = {
        node for node, values in zip(split.crossing, columns, strict=True)
        if all(value.dim() > 1 and bool((value == value[:1]).all()) for value in values)
    }  # fmt: skip
    for i, node in enumerate(split.crossing):
        users = [user for user in node.users if user not in split.time]
        if dims := free_sizes(node):
            columns[i] = tuple(_first_row(value, dims).clone() for value in columns[i])
        elif node in equal and all(row_is_enough(user, equal) for user in users):
            columns[i] = tuple(value[:1].clone() for value in columns[i])
    return [list(row) for row in zip(*columns, strict=True)] if columns else tables


def _first_row(value: Tensor, dims: Sequence[int]) -> Tensor:
    """``value`` 1 long along ``dims``."""
    for dim in dims:
        value = value.narrow(dim, 0, 1)
    return value


def _is_one_row(value: Tensor, dims: Sequence[int]) -> bool:
    """Whether all rows are equal, up to the order of summation: guidance sees the same timestep twice."""
    first = _first_row(value, dims).expand_as(value)
    if not value.is_floating_point():
        return torch.equal(value, first)
    finite = value[value.isfinite()].abs()
    return torch.allclose(value, first, rtol=1e-5, atol=1e-6 * float(finite.max()) if finite.numel() else 0.0)


def _body(module: fx.GraphModule, split: TimeSplit, names: tuple[str, ...]) -> fx.GraphModule:
    """The graph with inputs (x, *conditions, *crossing values) and the time path gone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = _inputs(module.graph)
    # in an order of our own; what came through ** is called conditions_<i>
    given = {STATE: inputs[STATE]}
    given |= {name: inputs.get(name) or inputs[f"conditions_{i}"] for i, name in enumerate(names)}
    for name, node in given.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    for i, node in enumerate(split.crossing):
        copies[node] = graph.placeholder(f"time_{i}")
        copies[node].target = copies[node].name  # a condition may be called so
    repeated = repeat_rows(graph, copies[inputs[STATE]], {node: copies[node] for node in split.crossing})
    (output,) = module.graph.output_node().all_input_nodes
    if output in split.time:
        raise UsageError("the network's output does not depend on its input x")
    for node in module.graph.nodes:
        if node.op != "output" and node not in copies and node not in split.time:
            seen = ChainMap({} if row_is_enough(node, repeated) else repeated, copies)
            copies[node] = graph.node_copy(node, seen.__getitem__)
    graph.output(copies[output])
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
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            raise UsageError("the network switches autocast; leave torch.autocast out, --precision sets the graph's")
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
