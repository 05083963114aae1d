"""A denoiser that takes a gradient inside, of an energy say, as the plain operations that the gradient amounts to.

autograd needs its tape: torch.export refuses it under no_grad, inference mode forgets it. So the module is traced once
with autograd on, forward and backward alike, and the graph of plain operations stands in for it: it runs in inference
mode, exports, folds, and is differentiable itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmd_export.checkpoints.static import Signature, call, first_line, gradients_possible
from mmd_export.conditions import CLASS_LABELS, names_of
from mmd_export.errors import UsageError

aten = torch.ops.aten
SAME = 1e-4
BATCHES = (1, 3)  # other than the 2 of the trace


class GradientDenoiser(nn.Module):
    """``network``, flattened. The weights stay in ``network``: the graph takes them as inputs."""

    def __init__(self, network: nn.Module, signature: Signature, where: str) -> None:
        super().__init__()
        self.network = network
        self.signature, self.where = signature, where
        self._graphs: dict[tuple[torch.dtype, torch.dtype], fx.GraphModule] = {}
        for timestep in (torch.int64, torch.float32):  # before any export, which must not trace inside
            self._graph(torch.float32, timestep)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """What ``network`` returns, for any batch."""
        if class_labels is not None:
            conditions[CLASS_LABELS] = class_labels
        told = (conditions[name] for name in names_of(self.signature.conditions))
        output: Tensor = self._graph(x.dtype, timestep.dtype)(self._values(), x, timestep, *told)
        return output

    def __getstate__(self) -> dict[str, Any]:
        """A copy traces again: it is for another type or for tuning, and fx graphs copy with warnings (torch 2.13)."""
        return {**self.__dict__, "_graphs": {}}

    def _values(self) -> list[Tensor]:
        return [*dict(self.network.named_parameters()).values(), *dict(self.network.named_buffers()).values()]

    def _graph(self, dtype: torch.dtype, timestep: torch.dtype) -> fx.GraphModule:
        if (dtype, timestep) not in self._graphs:
            self._graphs[dtype, timestep] = self._trace(dtype, timestep)
        return self._graphs[dtype, timestep]

    def _trace(self, dtype: torch.dtype, timestep: torch.dtype) -> fx.GraphModule:
        """Forward and backward as aten ops, the batch free, nothing else."""
        names = [*dict(self.network.named_parameters()), *dict(self.network.named_buffers())]

        def run(values: list[Tensor], *inputs: Tensor) -> Any:
            labels, others = self.signature.named(inputs[2:])
            weights = dict(zip(names, values, strict=True))
            return torch.func.functional_call(self.network, weights, (*inputs[:2], *labels), others)

        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with gradients_possible():
            x, t, *told = self.signature.examples(2, dtype)
            inputs = [_free_batch(fake, x), fake.from_tensor(t.to(timestep)), *(_free_batch(fake, y) for y in told)]
            values = [fake.from_tensor(value) for value in self._values()]
            try:
                with fake, sdpa_kernel(SDPBackend.MATH):
                    traced = make_fx(run, decomposition_table=_decompositions())(values, *inputs)
            except Exception as error:  # tracing runs the module's own code
                raise UsageError(
                    f"{self.where} takes a gradient that torch {torch.__version__} cannot trace: {first_line(error)}"
                    + ("; torch 2.13 or newer may" if torch.__version__ < "2.13" else "")
                ) from error
        _erase_detach(traced)
        return traced

    def require_equal(self) -> None:
        """Hold the graph against the module itself, on batches it was not traced with."""
        for batch in BATCHES:
            inputs = self.signature.examples(batch)
            expected = call(self.network, self.signature, inputs, self.where)
            found = call(self, self.signature, inputs, self.where)
            error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not error <= SAME:
                raise UsageError(
                    f"{self.where}: its gradient, traced, differs by {error:.2g} of the largest output at batch "
                    f"{batch}; it depends on more than its inputs"
                )


def _free_batch(fake: FakeTensorMode, value: Tensor) -> Tensor:
    sizes = [DimDynamic.DYNAMIC, *(DimDynamic.STATIC for _ in value.shape[1:])]
    result: Tensor = fake.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    return result


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Every backward op that torch can write as plain ones, and the one of convolution, which it cannot."""
    plain = {op: rule for op, rule in decomposition_table.items() if "backward" in str(op)}
    return {**plain, aten.convolution_backward.default: _convolution_backward}


def _convolution_backward(  # noqa: PLR0913, PLR0917 - the schema of aten.convolution_backward
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient with respect to the input, a convolution the other way round; Dumoulin and Visin 2016.

    That with respect to the weights is no part of a denoiser.
    """
    del bias_sizes, output_padding
    if mask[1] or mask[2]:
        raise UsageError("the gradient is taken with respect to weights; with respect to x is what a sampler needs")
    if not mask[0]:
        return None, None, None
    if transposed:
        back = aten.convolution.default(grad, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
        return back, None, None
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    missing = [
        size - ((out - 1) * s - 2 * p + r)
        for size, out, s, p, r in zip(x.shape[2:], grad.shape[2:], stride, padding, reach, strict=True)
    ]
    return aten.convolution.default(grad, weight, None, stride, padding, dilation, True, missing, groups), None, None


def _erase_detach(module: fx.GraphModule) -> None:
    """The graph is the function itself; where the module cut its own gradient has no meaning in it."""
    for node in module.graph.nodes:
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
