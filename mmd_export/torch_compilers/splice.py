"""Put the nodes of a lowered call in the places of the operator that stands for it, in ExecuTorch's edge dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree


def splice(outer: ExportedProgram, parts: Mapping[str, ExportedProgram], opaque: Any) -> ExportedProgram:
    """``outer`` with each call of ``opaque(inputs, name, shape)`` replaced by the nodes of ``parts[name]``.

    Weights and delegates of a part are there once, however often it is called. An operator of the edge dialect has that
    of torch as its ``_op``.
    """
    graph, module = outer.graph, outer.graph_module
    spots = [node for node in graph.nodes if opaque in (node.target, getattr(node.target, "_op", None))]
    assert spots, f"no call of {opaque}"
    mode = next(node.meta["val"].fake_mode for node in graph.nodes if isinstance(node.meta.get("val"), FakeTensor))
    state, constants = dict(outer.state_dict), dict(outer.constants)
    specs: list[InputSpec] = []
    copiers = {}
    for name in sorted({str(spot.args[1]) for spot in spots}):
        copiers[name] = copier = _Copier(name, parts[name], mode)
        specs = [*copier.add_weights(graph, module), *specs]  # each goes before all that is there
        state |= {f"{name}.{key}": value for key, value in parts[name].state_dict.items()}
        constants |= {f"{name}.{key}": value for key, value in parts[name].constants.items()}
    for spot in spots:
        with graph.inserting_before(spot):
            spot.replace_all_uses_with(copiers[str(spot.args[1])].copy(graph, spot.args[0]))
        graph.erase_node(spot)
    graph.lint()
    module.recompile()
    signature = ExportGraphSignature([*specs, *outer.graph_signature.input_specs], outer.graph_signature.output_specs)
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=outer.range_constraints,
        module_call_graph=outer.module_call_graph,
        example_inputs=outer.example_inputs,
        constants=constants,
        verifiers=outer.verifiers,
    )


class _Copier:
    """Copies of one part; its weights become inputs of the outer graph once, its delegates attributes once."""

    def __init__(self, name: str, part: ExportedProgram, mode: FakeTensorMode) -> None:
        self.name, self.part, self.mode = name, part, mode
        self.shared: dict[fx.Node, fx.Node] = {}

    def add_weights(self, graph: fx.Graph, module: fx.GraphModule) -> list[InputSpec]:
        """Placeholders of the weights before all others, and the delegates; returns the placeholders' specs."""
        specs = {spec.arg.name: spec for spec in self.part.graph_signature.input_specs}
        first, found = next(iter(graph.nodes)), []
        for node in self.part.graph.nodes:
            if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
                with graph.inserting_before(first):
                    self.shared[node] = copy = graph.placeholder(f"{self.name}_{node.name}")
                copy.meta = self._meta(node)
                spec = specs[node.name]
                found.append(replace(spec, arg=TensorArgument(copy.name), target=f"{self.name}.{spec.target}"))
            elif node.op == "get_attr":
                delegate = getattr(self.part.graph_module, str(node.target))
                _know_shapes(delegate)
                setattr(module, f"{self.name}_{node.target}", delegate)
        return found

    def copy(self, graph: fx.Graph, inputs: Any) -> fx.Node:
        """The nodes of the part, reading ``inputs``, at the insertion point; returns the one output."""
        places, given = dict(self.shared), iter(inputs)
        for node in self.part.graph.nodes:
            if node.op == "output":
                output = places[node.args[0][0]]
            elif node.op == "placeholder":
                places[node] = places.get(node) or next(given)
            elif node.op == "get_attr":
                places[node] = graph.get_attr(f"{self.name}_{node.target}")
            else:
                places[node] = graph.node_copy(node, places.__getitem__)
                places[node].meta = self._meta(node)
        return output

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        """The node's shapes, in the fake tensors of the outer graph."""

        def fake(value: Any) -> Any:
            return _empty_like(value, self.mode) if isinstance(value, Tensor) else value

        return {"val": pytree.tree_map(fake, node.meta["val"])}


def _empty_like(value: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype)


def _know_shapes(delegate: Any) -> None:
    """Let passes that run a delegate for its shapes read them: ExecuTorch 1.5 unlifts its whole graph for each of them.

    torch/_higher_order_ops/executorch_call_delegate.py, call_delegate_cpu; delete when it caches the module.
    """
    values = [node.meta["val"] for node in delegate.original_module.graph.output_node().args[0]]

    def run(*_: Tensor) -> list[Tensor]:
        return [torch.empty_strided(tuple(each.shape), each.stride(), dtype=each.dtype) for each in values]

    delegate.original_module.module = lambda: run
