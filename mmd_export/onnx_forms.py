"""Forms of a float32 graph that compute the same with less. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from mmd_export.onnx_compose import GraphSpec


def make_lean(call: ir.Model, spec: GraphSpec) -> None:
    """Rewrite one network call, and the decoder of ``spec``, for any device."""
    from mmd_export.onnx_attention import keep_channels_first
    from mmd_export.onnx_upsample import convolve_before_upsampling

    for part in (call, *([] if spec.decoder is None else [spec.decoder[0]])):
        convolve_before_upsampling(part)
        keep_channels_first(part)


def suit_processors(model: ir.Model) -> None:
    """Rewrite a whole sampler for processors."""
    from mmd_export.onnx_affine import scale_and_shift_at_once
    from mmd_export.onnx_winograd import filter_rows

    scale_and_shift_at_once(model)
    filter_rows(model)
