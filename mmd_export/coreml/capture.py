"""The whole sampler as the graph that coremltools converts: norms and attention in its terms, states by name.

GroupNorm becomes layer_norm over the groups: one op for seven. Attention is written out: the fused op of iOS 18 has
reported faults on GPUs, and older systems have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from mmd_export.errors import NotAvailableError
from mmd_export.program import DecoderProgram, ExportedDenoiser, SamplerProgram
from mmd_export.specialise import quiet_copies
from mmd_export.unrolled_program import unroll

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Captured:
    """``plan`` names the nodes that stay float32 whatever the precision: the sampler's own arithmetic, the decoder.

    ``last``: the state that the decoder reads.
    """

    program: ExportedProgram
    plan: frozenset[str]
    last: str


class _Program(SamplerProgram):
    """The same program, its call rewritten."""

    def runner(self) -> nn.Module:
        denoiser = ExportedDenoiser(self)
        rewrite(denoiser.call)
        return denoiser


class _Decoder(DecoderProgram):
    """The same decoder, rewritten."""

    def runner(self) -> nn.Module:
        module = super().runner()
        rewrite(module)
        return module


def capture(program: SamplerProgram, output: str) -> Captured:
    """noise -> ``sample``, with ``state_1`` ... ``state_K`` as names of values inside.

    ``output``: float32, or uint8 for levels 0 to 255 as float32 (B, C, H, W), which is what an image output takes.
    """
    fields = vars(program)
    if program.decoder is not None:
        fields = fields | {"decoder": _Decoder(**vars(program.decoder))}
    with quiet_copies():
        exported = unroll(_Program(**fields), states=True).run_decompositions({})
    steps = program.plan.step_count
    plan = _name_states(exported, steps, program.plan.clamp_output or program.decoder is not None)
    if output == "uint8":
        plan |= _append_levels(exported)
    exported.graph.lint()
    exported.graph_module.recompile()
    return Captured(exported, frozenset(plan), f"state_{steps}")


def rewrite(module: nn.Module) -> None:
    """Replace norms, attention and gelu in a captured call; the new functions are captured in their turn."""
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.target is _ATEN.group_norm.default:
            node.target = group_norm
        elif node.target is _ATEN.scaled_dot_product_attention.default:
            node.target = attention
        elif node.target is _ATEN.gelu.default and node.kwargs.get("approximate") == "tanh":
            node.target, node.kwargs = gelu, {}
    module.recompile()


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001 - aten's signature
) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta over each group of channels; Wu and He 2018. x: (B, C, ...)."""
    rows = x.reshape(x.shape[0], groups, -1)
    y = F.layer_norm(rows, rows.shape[2:], None, None, eps).reshape(x.shape)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - aten's signature; check_static refuses dropout
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v; Vaswani et al. 2017, eq. 1. The scale comes first, so that half holds q k^T."""
    if is_causal or enable_gqa:
        raise NotAvailableError("target coreml has no causal or grouped attention; use --target onnx")
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, dim=-1) @ value


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); Hendrycks and Gimpel 2016.

    coremltools 9.0 reads ``approximate`` as a positional argument alone and would take the exact form, 5e-4 off
    (converters/mil/frontend/torch/ops.py, gelu); delete this once it reads the keyword.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _name_states(exported: ExportedProgram, steps: int, finished: bool) -> set[str]:
    """Name the states, leave ``sample`` as the only output; returns the names of all but the network's calls.

    ``finished``: something follows the last state. The converter keeps the name of hardtanh and not that of clamp, and
    drops a product with 1.0 together with its name, so that is left out here.
    """
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target is _ATEN.alias.default:  # what is left of a cast to the same type; the converter has none
            _leave_out(node)
        elif _in_network(node):
            continue
        elif node.target is _ATEN.clamp.default:
            node.target = _ATEN.hardtanh.default
        elif node.target is _ATEN.mul.Tensor and node.args[1] == 1.0:
            _leave_out(node)
    output = graph.output_node()
    sample, *states = output.args[0]
    for k, state in enumerate(states if finished else states[:-1], start=1):
        state._rename(f"state_{k}")
    output.args = ((sample,),)
    specs = exported.graph_signature.output_specs
    del specs[1 : 1 + steps]
    specs[0].arg.name = sample.name
    return {node.name for node in graph.nodes if node.op == "call_function" and not _in_network(node)}


def _leave_out(node: fx.Node) -> None:
    """Give everyone the node's first argument in its place."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _in_network(node: fx.Node) -> bool:
    """Whether the node comes from a call of the network; the decoder is none, whatever its parts are called."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
    paths = [str(entry[0]).split(".") for entry in stack.values()]
    return any("denoiser" in path for path in paths)


def _append_levels(exported: ExportedProgram) -> set[str]:
    """round((sample / 2 + 0.5) * 255) behind the sample; returns the names of the new nodes."""
    graph = exported.graph
    output = graph.output_node()
    (value,) = output.args[0]
    names = set()
    with graph.inserting_before(output):
        for target, number in ((_ATEN.mul.Tensor, 0.5), (_ATEN.add.Tensor, 0.5), (_ATEN.mul.Tensor, 255.0)):
            value = _call(graph, target, (value, number), value)
            names.add(value.name)
        value = _call(graph, _ATEN.round.default, (value,), value)
    output.args = ((value,),)
    exported.graph_signature.output_specs[0].arg.name = value.name
    return names | {value.name}


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], like: Any) -> fx.Node:
    """A new node whose value has the shape and type of ``like``."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = like.meta["val"]
    return node
