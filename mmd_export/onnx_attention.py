"""Self-attention of images with fewer products and without moving channels last. onnx_ir and onnxscript, no torch.

What diffusers' ``Attention`` does to a normalised image x (N, C, L), L = H W, heads apart, is

    y = W_o (W_v n + b_v) softmax((W_q n + b_q)^T (W_k n + b_k) / sqrt(d))^T + b_o,    n = gamma x + beta

with the channels last in between. All of it is left multiplication by a matrix, so channels may stay first; and what a
score has that is the same for every key leaves the softmax alone. So, exactly, but for rounding:

- gamma and beta become part of the projections, b_k goes, b_v becomes part of b_o, as weights of a softmax sum to 1;
- one head: the scores are (M x + c)^T x with M = gamma W_k^T W_q gamma / sqrt(d), the output is W_o W_v gamma times the
  mean of x, which is two products with a C x C matrix instead of four;
- several heads: one product for queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter import pattern

from mmd_export.onnx_nodes import array_of

_LAST, _HEADS = [0, 2, 1], [0, 2, 1, 3]
_PROJECTIONS = ("w_q", "w_k", "w_v", "w_o")
_VECTORS = ("b_q", "b_k", "b_v", "b_o", "gamma", "beta")


def keep_channels_first(model: ir.Model) -> int:
    """Rewrite the self-attention of ``model``, float32; returns how many. Weights are multiplied in float64."""
    rules = [kind.rule() for kind in (_Attention, _AttentionOfAnyBatch)]  # type: ignore[no-untyped-call]
    return pattern.RewriteRuleSet(rules).apply_to_model(model)


@dataclass(frozen=True)
class Projections:
    """Float64; matrices act from the left: ``first`` and ``offset`` make the scores, ``last`` and ``bias`` the output.

    One head: ``first`` (C, C) makes x the queries that meet x itself. Several: (3 C, C), queries, keys, values.
    """

    first: NDArray[np.float64]
    offset: NDArray[np.float64]  # (C, 1) or (3 C, 1)
    last: NDArray[np.float64]  # (C, C)
    bias: NDArray[np.float64]  # (C, 1)


def projections(weights: Mapping[str, NDArray[Any]], scale: float, heads: int) -> Projections:
    """Of the formula above; ``weights`` by their names there, the matrices (C, C), the others (C,).

    ``scale``: what queries and keys are multiplied by, each.
    """
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    gamma, beta = w["gamma"], w["beta"]
    queries, keys, values = ((w[name] * gamma, w[name] @ beta + w[bias]) for name, bias in
                             (("w_q", "b_q"), ("w_k", "b_k"), ("w_v", "b_v")))  # fmt: skip
    bias = (w["w_o"] @ values[1] + w["b_o"])[:, None]
    if heads == 1:
        meeting = keys[0].T * scale**2
        return Projections(meeting @ queries[0], (meeting @ queries[1])[:, None], w["w_o"] @ values[0], bias)
    nothing = np.zeros_like(gamma)
    first = np.concatenate([queries[0] * scale, keys[0] * scale, values[0]])
    offset = np.concatenate([queries[1] * scale, nothing, nothing])[:, None]
    return Projections(first, offset, w["w_o"], bias)


class _Attention(pattern.RewriteRuleClassBase):
    """As torch.onnx writes it for a batch that is known."""

    def pattern(  # noqa: PLR0913, PLR0917  # the pattern's variables
        self, op: Any, x: Any, gamma: Any, beta: Any, w_q: Any, b_q: Any, w_k: Any, b_k: Any, w_v: Any, b_v: Any,
        w_o: Any, b_o: Any, split: Any, scale: Any, image: Any,
    ) -> Any:  # fmt: skip
        """From the normalised image to the output as an image."""
        tokens = op.Transpose(op.Add(op.Mul(x, gamma), beta), perm=_LAST)
        q, k, v = (op.Add(op.MatMul(tokens, w), b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        q, k, v = (op.Transpose(op.Reshape(each, split), perm=_HEADS) for each in (q, k, v))
        scores = op.Softmax(op.MatMul(op.Mul(q, scale), op.Mul(self.turned(op, k), scale)), axis=-1)
        mean = op.Reshape(op.Transpose(op.MatMul(scores, v), perm=_HEADS), pattern.ANY_VALUE)
        return op.Reshape(op.Transpose(op.Add(op.MatMul(mean, w_o), b_o), perm=_LAST), image)

    def turned(self, op: Any, k: Any) -> Any:
        """The last two axes of the keys exchanged."""
        apart = op.Reshape(k, pattern.ANY_VALUE)
        return op.Reshape(op.Transpose(apart, perm=_LAST), pattern.ANY_VALUE)

    def check(self, _context: Any, **found: ir.Value) -> bool:  # type: ignore[override]  # as its documentation has it
        """Whether all but x are float32 constants of one width, as they are where queries attend to their own image."""
        known = {name: value.const_value for name, value in found.items() if name != "x"}
        if any(tensor is None for tensor in known.values()):
            return False
        shapes = {name: tuple(tensor.shape.numpy()) for name, tensor in known.items() if tensor is not None}
        channels = shapes["gamma"][0]
        *_, heads, width = known["split"].numpy()  # type: ignore[union-attr]
        return (
            all(shapes[name] == (channels, channels) for name in _PROJECTIONS)
            and all(np.prod(shapes[name]) == channels for name in _VECTORS)
            and known["scale"].size == 1  # type: ignore[union-attr]
            and heads * width == channels
            and all(found[name].dtype == ir.DataType.FLOAT for name in (*_PROJECTIONS, *_VECTORS))
        )

    def rewrite(
        self, op: Any, x: ir.Value, image: ir.Value, split: ir.Value, scale: ir.Value, **found: ir.Value
    ) -> Any:
        """The same with channels first."""
        weights = {name: _array(found[name]).reshape(-1) for name in _VECTORS}
        weights |= {name: _array(found[name]).T for name in _PROJECTIONS}
        *_, heads, width = (int(size) for size in _array(split))
        made = projections(weights, float(_array(scale).item()), heads)
        place = str(found["b_q"].name)

        def constant(name: str, array: NDArray[Any]) -> ir.Value:
            tensor = ir.tensor(array.astype(np.float32) if array.dtype == np.float64 else array)
            value: ir.Value = op.initializer(tensor, name=f"{place}/{name}")
            return value

        first = op.Add(op.MatMul(constant("first", made.first), x), constant("offset", made.offset))
        if heads == 1:
            queries, keys, values = first, x, x
        else:
            apart = op.Reshape(first, constant("apart", np.array([0, 3 * heads, width, -1])))
            queries, keys, values = op.Split(apart, axis=1, num_outputs=3, _outputs=3)
        turned = [0, 2, 1] if heads == 1 else [0, 1, 3, 2]
        scores = op.Softmax(op.MatMul(op.Transpose(queries, perm=turned), keys), axis=-1)
        mean = op.MatMul(values, op.Transpose(scores, perm=turned))
        if heads > 1:
            mean = op.Reshape(mean, constant("together", np.array([0, heads * width, -1])))
        y = op.Add(op.MatMul(constant("last", made.last), mean), constant("bias", made.bias))
        return op.Reshape(y, image)


class _AttentionOfAnyBatch(_Attention):
    """The same for a free one."""

    def turned(self, op: Any, k: Any) -> Any:
        shape = op.Shape(k)
        batch, places, width = (op.Slice(shape, pattern.ANY_VALUE, pattern.ANY_VALUE) for _ in range(3))
        apart = op.Reshape(k, op.Concat(pattern.ANY_VALUE, places, width, axis=0))
        return op.Reshape(op.Transpose(apart, perm=_LAST), op.Concat(batch, width, places, axis=0))


def _array(value: ir.Value) -> NDArray[Any]:
    array = array_of(value)
    assert array is not None
    return array
