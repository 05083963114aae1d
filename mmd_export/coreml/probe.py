"""Where half precision does not reach: the ranges of every value on the sampler's real trajectory.

The captured graph is run in float32 from Philox noise, K steps, each on the states before it, and what leaves a safe
part of the range of half precision is computed in float32 in the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mmd_export.coreml.capture import Captured
from mmd_export.coreml.half import LARGEST_HALF
from mmd_export.errors import UsageError
from mmd_export.fx_ends import fx_ends, fx_phases
from mmd_export.noise import sampler_noise
from mmd_export.program import SamplerProgram

PROBE_SEED = 20240229
PROBE_RUNS = 2
SAFE = LARGEST_HALF / 4  # of what is stored, and of the squares in a norm: other noises may reach twice as far


def find_islands(exported: ExportedProgram, program: SamplerProgram) -> frozenset[str]:
    """The names of the nodes that must stay float32; raises UsageError where the trajectory is not finite."""
    ranges = _Ranges(exported.graph_module)
    for run in range(PROBE_RUNS):
        with torch.inference_mode():
            ranges.run(*lifted(exported), *_inputs(program, PROBE_SEED + run))
    wild = [name for name, largest in ranges.largest.items() if not math.isfinite(largest)]
    if wild:
        raise UsageError(f"the sampler is not finite at {wild[0]!r} on its own trajectory; half precision cannot help")
    return frozenset(
        node.name
        for node in exported.graph.nodes
        if ranges.squares.get(node.name, 0.0) > SAFE
        or any(ranges.largest.get(each.name, 0.0) > SAFE for each in (node, *node.all_input_nodes))
    )


def find_ends(captured: Captured) -> frozenset[str]:
    """The names of the nodes at both ends of every call: ``mmd_export.ends``."""
    nodes = captured.program.graph.nodes
    network = {node for node in nodes if node.op == "call_function" and node.name not in captured.plan}
    plan = {node for node in nodes if node.name in captured.plan or node.name == "noise"}
    return frozenset(node.name for node in fx_ends(network, plan))


def find_phases(captured: Captured) -> frozenset[str]:
    """The names of the sinusoids of what the network is told, and of what they are made of."""
    graph = captured.program.graph
    noise = next(node for node in graph.nodes if node.name == "noise")
    return frozenset(node.name for node in fx_phases(graph, noise))


class _Ranges(fx.Interpreter):
    """Runs the graph; ``largest`` absolute value of each node, ``squares``: largest centred square in each norm."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[str, float] = {}
        self.squares: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            _raise_to(self.largest, n.name, result.abs().max().item())
            if n.target is torch.ops.aten.layer_norm.default:
                x, shape = self.env[n.args[0]], n.args[1]  # type: ignore[index]
                axes = tuple(range(-len(shape), 0))  # type: ignore[arg-type]
                centred = x - x.mean(dim=axes, keepdim=True)
                _raise_to(self.squares, n.name, centred.square().max().item())
        return result


def _raise_to(found: dict[str, float], name: str, value: float) -> None:
    found[name] = value if math.isnan(value) else max(found.get(name, 0.0), value)


def lifted(exported: ExportedProgram) -> list[Tensor]:
    """Weights and constants, in the order in which the graph takes them."""
    signature = exported.graph_signature
    held: dict[str, Any] = {**exported.state_dict, **exported.constants}
    return [held[str(spec.target)] for spec in signature.input_specs if spec.target is not None]


def _inputs(program: SamplerProgram, seed: int) -> list[Tensor]:
    """Noise, step noise and examples of the conditions, in the order of the manifest."""
    rows = program.batch or 1
    arrays: list[Any] = [*sampler_noise(seed, rows, program.shape, program.plan.noisy_steps).values()]
    arrays += [condition.examples(seed, rows) for condition in program.conditions]
    return [torch.from_numpy(array) for array in arrays]
