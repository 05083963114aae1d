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
_BIASES = ("b_q", "b_k", "b_v", "b_o")
_AFFINE = ("gamma", "beta")
_TOKENS_HEADS_WIDTH = 3


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
        w_o: Any, b_o: Any, split: Any, keys: Any, keys_turned: Any, scale: Any, joined: Any, image: Any,
    ) -> Any:  # fmt: skip
        """From the normalised image to the output as an image."""
        tokens = op.Transpose(op.Add(op.Mul(x, gamma), beta), perm=_LAST)
        q, k, v = (op.Add(op.MatMul(tokens, w), b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        q, k, v = (op.Transpose(op.Reshape(each, split), perm=_HEADS) for each in (q, k, v))
        k = self.turned(op, k, keys, keys_turned)
        scores = op.Softmax(op.MatMul(op.Mul(q, scale), op.Mul(k, scale)), axis=-1)
        mean = op.Reshape(op.Transpose(op.MatMul(scores, v), perm=_HEADS), joined)
        return op.Reshape(op.Transpose(op.Add(op.MatMul(mean, w_o), b_o), perm=_LAST), image)

    def turned(self, op: Any, k: Any, keys: Any, keys_turned: Any) -> Any:
        """The last two axes of the keys exchanged."""
        return op.Reshape(op.Transpose(op.Reshape(k, keys), perm=_LAST), keys_turned)

    def check(self, _context: Any, **found: ir.Value | None) -> bool:  # type: ignore[override]  # as it is documented
        """Whether all but x are float32 weights of one width, where queries attend to their own image."""
        arrays = {name: array_of(value) for name, value in found.items() if name != "x"}
        if any(arrays[name] is None for name in (*_PROJECTIONS, *_BIASES, *_AFFINE, "split", "scale", "joined")):
            return False
        known = {name: array for name, array in arrays.items() if array is not None}
        channels = known["w_q"].shape[0]
        return (
            all(known[name].dtype == np.float32 for name in (*_PROJECTIONS, *_BIASES, *_AFFINE))
            and all(known[name].shape == (channels, channels) for name in _PROJECTIONS)
            and all(known[name].shape == (channels,) for name in _BIASES)
            and all(known[name].shape in ((channels, 1), (1, channels, 1)) for name in _AFFINE)
            and known["scale"].size == 1
            and self._keeps_heads_apart(known, channels)
        )

    @staticmethod
    def _keeps_heads_apart(known: Mapping[str, NDArray[Any]], channels: int) -> bool:
        """Whether the reshapes that are constant go between tokens of C numbers and heads of d."""
        if len(known["split"]) != _TOKENS_HEADS_WIDTH + 1:
            return False
        _, places, heads, width = known["split"].tolist()
        ends = {"joined": (places, channels), "keys": (places, width), "keys_turned": (width, places)}
        inferred = -1
        return heads * width == channels and all(
            inferred in (size, end) or size == end
            for name in ends.keys() & known.keys()
            for size, end in zip(known[name].tolist()[-2:], ends[name], strict=True)
        )

    def rewrite(
        self, op: Any, x: ir.Value, image: ir.Value, split: ir.Value, scale: ir.Value, **found: ir.Value
    ) -> Any:
        """The same with channels first."""
        weights = {name: _array(found[name]).reshape(-1) for name in (*_BIASES, *_AFFINE)}
        weights |= {name: _array(found[name]).T for name in _PROJECTIONS}
        *_, heads, width = (int(size) for size in _array(split))
        made = projections(weights, float(_array(scale).item()), heads)
        place = f"{found['b_q'].name}/{x.name}"  # modules may share a bias, and equal ones are one initialiser

        def constant(name: str, array: NDArray[Any]) -> ir.Value:
            tensor = ir.tensor(array.astype(np.float32) if array.dtype == np.float64 else array)
            value: ir.Value = op.initializer(tensor, name=f"{place}.{name}")
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

    def turned(self, op: Any, k: Any, keys: Any, keys_turned: Any) -> Any:  # noqa: ARG002  # sizes that it computes
        shape = op.Shape(k)
        batch, places, width = (op.Slice(shape, pattern.ANY_VALUE, pattern.ANY_VALUE) for _ in range(3))
        apart = op.Reshape(k, op.Concat(pattern.ANY_VALUE, places, width, axis=0))
        return op.Reshape(op.Transpose(apart, perm=_LAST), op.Concat(batch, width, places, axis=0))


def _array(value: ir.Value) -> NDArray[Any]:
    array = array_of(value)
    assert array is not None
    return array
