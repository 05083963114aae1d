"""A network in the arithmetic that ships: its captured graph with every rounding of a lower precision, differentiable.

Grids (int8, fp8, w8, w4): the layers that the target quantises, with its ranges, multiply rounded weights and, where
activations have a grid, rounded activations; all else is float32, as in the graph. 16 bits (fp16, bf16): float32
arithmetic with every weight and every result of an operation rounded, but those of the folded time path and at
both ends, as ``mmd_export.precision.emulate`` does to the finished graph. One operation of torch may be several there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx

from mmd_export.checkpoint import Checkpoint
from mmd_export.denoiser import timestep_tensor, typical_timestep
from mmd_export.errors import UsageError
from mmd_export.fx_ends import fx_ends
from mmd_export.onnx_translate import translate
from mmd_export.plan import StepPlan
from mmd_export.precision.formats import GRIDS, HALVES, Grid, Half
from mmd_export.precision.lower import CALIBRATED
from mmd_export.precision.ranges_of_layers import layer_ranges
from mmd_export.precision.trajectory import Calls
from mmd_export.program import export_program
from mmd_export.specialise import STATE, TimeSplit, capture, split_time
from mmd_export.tuned_precision import TunedLayer, TunedPrecision
from mmd_finetune.fake_quantise import on_activation_grid, on_weight_grid, round_half

_aten = torch.ops.aten
_PRODUCTS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
_TOO_MANY = "has products with weights that tuning cannot follow"


@dataclass(frozen=True)
class QuantisedLayer:
    """The grid of its weight, and of its activation with a scale for each call if that has one."""

    weight: Grid
    activation: Grid | None
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Emulation:
    """How one architecture computes in a precision; it holds no weights of its own and is shared by all copies.

    ``timestep_dtype`` is what the graph was captured with; ``layers`` is empty for 16 bits, ``half`` None for grids.
    """

    module: fx.GraphModule
    split: TimeSplit
    timestep_dtype: torch.dtype
    record: TunedPrecision
    half: Half | None = None
    layers: Mapping[fx.Node, QuantisedLayer] = field(default_factory=dict)
    ends: frozenset[fx.Node] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def run(self, weights: Mapping[str, Tensor], x: Tensor, k: int, timestep: Tensor) -> Tensor:
        """Raw output (B, C, H, W) of call ``k`` of the network with these ``weights``, by name."""
        output: Tensor = _Rounded(self, weights, k).run(x, timestep.to(self.timestep_dtype))
        return output


class _Rounded(fx.Interpreter):
    """One call, node by node."""

    def __init__(self, emulation: Emulation, weights: Mapping[str, Tensor], k: int) -> None:
        super().__init__(emulation.module)
        self.how, self.weights, self.k = emulation, weights, k
        self.crossing = set(emulation.split.crossing)

    def fetch_attr(self, target: str) -> Any:
        return self.weights[target] if target in self.weights else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``; of a quantised layer with its weight and activation rounded first."""
        layer = self.how.layers.get(n)
        if layer is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return n.target(*self._on_grid(layer, args), **kwargs)  # type: ignore[operator]  # an aten overload
        value = super().run_node(n)
        half = self.how.half
        if half is None or not isinstance(value, Tensor) or not value.is_floating_point() or self._stays(n):
            return value
        return round_half(value, half)

    def _stays(self, n: fx.Node) -> bool:
        """The time path is folded in float32, only what leaves it is stored in 16 bits; the network's ends stay too."""
        if n.op in ("get_attr", "placeholder"):
            return all(user in self.how.split.time or user in self.how.ends for user in n.users)
        in_time = n in self.how.split.time and n not in self.crossing
        return in_time or n in self.how.ends or n.op == "output"

    def _on_grid(self, layer: QuantisedLayer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, weight, *rest = args
        if layer.activation is not None:
            x = on_activation_grid(x, layer.scales[self.k], layer.activation)
        return (x, on_weight_grid(weight, layer.weight), *rest)


def emulate(
    base: Checkpoint, plan: StepPlan, precision: str, images: int | None = None, *, fractional: bool = False
) -> Emulation:
    """The emulation of ``base``'s network in ``precision`` over ``plan``, its ranges set from ``images`` trajectories.

    ``fractional``: timesteps may become fractions. Raises UsageError for a network whose products cannot be followed.
    """
    first = 0.5 if fractional else typical_timestep(plan.timesteps)
    device = next(base.denoiser.parameters()).device
    example = torch.zeros(2, *base.shape, device=device)
    module = capture(base.denoiser, first, example, {}, dynamic_batch=True)
    split, dtype = split_time(module.graph), timestep_tensor(first).dtype
    if precision in HALVES:
        record, ends = TunedPrecision(precision), _ends(module, split)
        return Emulation(module, split, dtype, record, HALVES[precision], ends=ends)
    layers, record = _quantised(base, plan, precision, images, _products(module, split))
    return Emulation(module, split, dtype, record, None, layers)


def _ends(module: fx.GraphModule, split: TimeSplit) -> frozenset[fx.Node]:
    """What stays float32 in the target's graph, whatever its range."""
    nodes = module.graph.nodes
    network = {node for node in nodes if node.op == "call_function" and node not in split.time}
    outside = {node for node in nodes if node.op == "output" or (node.op == "placeholder" and node.name == STATE)}
    return frozenset(fx_ends(network, outside))


def _products(module: fx.GraphModule, split: TimeSplit) -> list[fx.Node]:
    """Every product of an activation with a weight behind the time path, in order."""
    return [
        node
        for node in module.graph.nodes
        if node.target in _PRODUCTS and node not in split.time and node.args[1].op == "get_attr"
    ]


def _quantised(
    base: Checkpoint, plan: StepPlan, precision: str, images: int | None, products: list[fx.Node]
) -> tuple[dict[fx.Node, QuantisedLayer], TunedPrecision]:
    """What the target does to each product: the graph that it makes is looked at, layer by layer."""
    ranges = layer_ranges(_calls(base, plan), precision, images)
    weights = dict(base.denoiser.named_parameters())
    grid = GRIDS[precision]
    if len(ranges) != len(products):
        raise UsageError(f"--precision {precision}: {base.name} {_TOO_MANY}; {len(products)} of {len(ranges)} known")
    layers, rows = {}, []
    for node, found in zip(products, ranges, strict=True):
        name = str(node.args[1].target)  # type: ignore[union-attr]  # a node, by _products
        own = weights[name].detach().cpu().numpy()
        if not np.array_equal(own.reshape(own.shape[0], -1), found.weight.reshape(found.weight.shape[0], -1)):
            raise UsageError(f"--precision {precision}: {base.name} {_TOO_MANY}: {name} is another layer in the graph")
        if found.grid is not None:
            layers[node] = QuantisedLayer(found.grid, grid if grid.activations else None, found.scales)
            rows.append(TunedLayer(name, own.size, found.scales))
    if not grid.activations:
        return layers, TunedPrecision(precision)
    return layers, TunedPrecision(precision, images or CALIBRATED, tuple(rows))


def _calls(base: Checkpoint, plan: StepPlan) -> Calls:
    """The float32 call as target onnx makes it, batch free."""
    network = base.denoiser
    if next(network.parameters()).device.type != "cpu":
        network = copy.deepcopy(network).cpu()
    program = export_program(network, plan, base.shape, None)
    constants = [[value.detach().numpy() for value in program.constants(k)] for k in range(plan.step_count)]
    return Calls(translate(program.step), constants, plan, base.shape, None)
