"""A part of a captured network as a program of its own. It was traced with the rest, and is not traced again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree


def lift(body: fx.GraphModule, source: ExportedProgram, inputs: Sequence[Tensor]) -> ExportedProgram:
    """``body``, its nodes copied out of the module of ``source``, with example ``inputs`` in its own order.

    Its one output is a tensor. ``val`` is computed where a node has none in its meta, and where an input has another
    shape than in ``source``, as one row in place of a whole batch.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    weights = _weights(body, graph, copies)
    for node in body.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda parent: copies[parent])
    given = [copies[node] for node in body.graph.nodes if node.op == "placeholder"]
    _complete_values(graph, given, inputs)
    output = graph.output_node()
    (result,) = output.all_input_nodes
    output.args = ((result,),)
    signature = ExportGraphSignature(
        [*weights, *(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in given)],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None)],
    )
    given_as, one = pytree.tree_structure((tuple(inputs), {})), pytree.tree_structure(inputs[0])
    names = [node.name for node in given]
    # the arguments of submodules are listed, those of the whole are in the signature
    call = ModuleCallSignature([], [], given_as, one, names)
    return ExportedProgram(
        body,
        graph,
        signature,
        {str(spec.target): _attribute(body, str(spec.target)) for spec in weights},
        source.range_constraints,
        [ModuleCallEntry("", call)],
        None,  # with examples, torch would check inputs under the names that only ``source`` has
        verifiers=source.verifiers,
    )


def _weights(body: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> list[InputSpec]:
    """An input of ``graph`` for each tensor that ``body`` holds, parameters first; ``copies`` learns which."""
    readers: dict[str, list[fx.Node]] = {}
    for node in body.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).append(node)
    parameters = [target for target in readers if isinstance(_attribute(body, target), nn.Parameter)]
    buffers = [target for target in readers if not isinstance(_attribute(body, target), nn.Parameter)]
    specs = []
    for letter, kind, targets in (("p", InputKind.PARAMETER, parameters), ("b", InputKind.BUFFER, buffers)):
        for target in targets:
            copy = graph.placeholder(f"{letter}_{target.replace('.', '_')}")
            copy.target = copy.name  # which fx has made legal and unique
            copy.meta = dict(readers[target][0].meta)
            copies.update(dict.fromkeys(readers[target], copy))
            persistent = True if kind is InputKind.BUFFER else None
            specs.append(InputSpec(kind, TensorArgument(copy.name), target, persistent))
    return specs


def _attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def _complete_values(graph: fx.Graph, given: Sequence[fx.Node], inputs: Sequence[Tensor]) -> None:
    """Compute the fake values that are missing, and those that another shape reaches."""
    mode = given[0].meta["val"].fake_mode
    changed = set()
    with enable_python_dispatcher(), mode, torch.no_grad():  # some operators know symbolic sizes in Python alone
        for node, value in zip(given, inputs, strict=True):
            if "val" not in node.meta:
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
                changed.add(node)
        for node in graph.nodes:
            if node.op != "call_function" or ("val" in node.meta and changed.isdisjoint(node.all_input_nodes)):
                continue
            args, keywords = fx.map_arg((node.args, node.kwargs), lambda parent: parent.meta["val"])
            value = node.target(*args, **keywords)
            if _layout(value) != _layout(node.meta.get("val")):
                node.meta["val"] = value
                changed.add(node)


def _layout(value: Any) -> Any:
    """What operators may see of a fake value without computing; sizes by name, as comparing them would fix them."""
    if isinstance(value, Tensor):
        return str(value.shape), str(value.stride()), value.dtype
    return [_layout(each) for each in value] if isinstance(value, (list, tuple)) else str(value)
