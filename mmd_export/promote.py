"""``build --auto-promote``: build, look for the operator that breaks the tolerance, keep it in float32, build again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from mmd_export.bisect import call_value
from mmd_export.blame import blame
from mmd_export.bundle import Bundle
from mmd_export.errors import ParityError
from mmd_export.parity import Rung, artefact_rung
from mmd_export.precision.emulate import emulated
from mmd_export.precision.formats import BF16
from mmd_export.runtime import Arrays, ChainSession

MOST = 32  # operators; a network that needs more wants another precision
Pack = Callable[[tuple[str, ...], Path], Bundle]  # values kept in float32, folder -> a bundle, not verified
OpenChain = Callable[[Bundle, Any], ChainSession]  # bundle, ONNX protobuf -> its chain


@dataclass(frozen=True)
class _Whole:
    """A chain as a session."""

    chain: ChainSession

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self.chain.run_chain(inputs)


def promoted(
    pack: Pack, open_chain: OpenChain, reference: ir.Model, scratch: Path, notify: Callable[[str], None]
) -> tuple[str, ...]:
    """The values of a call whose operators must stay float32 for the tolerance to hold; one is found a build.

    Raises ParityError where the culprit is no operator of the network, or ``MOST`` of them are not enough.
    """
    kept: list[str] = []
    while True:
        bundle = pack(tuple(kept), scratch / f"trial-{len(kept)}")
        graph = runnable(bundle)
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


def runnable(bundle: Bundle) -> ir.Model:
    """The artefact's graph; of bf16, for which onnxruntime's CPU provider has no kernels, an emulation of it."""
    model = ir.load(bundle.artefact_path)
    return emulated(model, BF16) if bundle.manifest.precision == BF16.name else model


def rung_of(bundle: Bundle, graph: ir.Model, open_chain: OpenChain) -> Rung:
    """Rung 6 of the bundle with ``graph`` in the place of its artefact."""
    chain = open_chain(bundle, ir.to_proto(graph))
    return artefact_rung(bundle, _Whole(chain), chain)
