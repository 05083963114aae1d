"""``build --auto-promote``: look for the operator that breaks the tolerance, keep it in float32, lower again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from mmd_export.bisect import call_value
from mmd_export.blame import blame
from mmd_export.bundle import Bundle
from mmd_export.errors import ParityError
from mmd_export.parity import Rung, artefact_rung
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import BF16
from mmd_export.runtime import ChainSession

MOST = 32  # operators; a network that needs more wants another precision
Lower = Callable[[tuple[str, ...]], ir.Model]  # values whose operators stay float32 -> the whole sampler, unrolled
OpenChain = Callable[[Bundle, Any], ChainSession]  # bundle, ONNX protobuf -> its chain


def promoted(
    bundle: Bundle, lower: Lower, open_chain: OpenChain, reference: ir.Model, notify: Callable[[str], None]
) -> tuple[str, ...]:
    """The values of a call whose operators must stay float32 for the tolerance of ``bundle`` to hold.

    ``bundle`` has the golden file and the manifest; one operator is found a round. Raises ParityError where the culprit
    is no operator of the network, or ``MOST`` of them are not enough.
    """
    kept: list[str] = []
    while True:
        graph = runnable(lower(tuple(kept)), bundle.manifest.precision)
        rung = rung_of(bundle, graph, open_chain)
        if rung.passed:
            return tuple(kept)
        culprit = blame(bundle, rung, graph, reference)
        value = call_value(culprit)
        if not value or value in kept or len(kept) == MOST:
            raise ParityError(
                f"bundle {bundle.name}: with {len(kept)} operators in float32 the tolerance {rung.atol:g} is still "
                f"missed by {rung.worst:.3g}: {culprit.message}; choose another --precision"
            )
        notify(f"auto-promote: {culprit.message}; it stays float32")
        kept.append(value)


def runnable(graph: ir.Model, precision: str) -> ir.Model:
    """The graph; of bf16, for which onnxruntime's CPU provider has no kernels, an emulation of it."""
    return emulated(graph, BF16) if precision == BF16.name else graph


def rung_of(bundle: Bundle, graph: ir.Model, open_chain: OpenChain) -> Rung:
    """Rung 6 of the bundle with ``graph`` in the place of its artefact; each chain is run once."""
    return artefact_rung(bundle, None, open_chain(bundle, ir.to_proto(graph)))
