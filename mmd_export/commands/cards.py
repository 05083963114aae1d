"""Put measured numbers into the model card of a bundle and seal it again: the same text as in CI and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd_export.bundle import Bundle, update_card
from mmd_export.card import LATENCY, PARITY, with_section
from mmd_export.errors import MmdExportError
from mmd_export.numbers import latency_markdown, measured_as, parity_markdown


def write_latency(folder: Path, bench: Mapping[str, Any]) -> None:
    """Latency alone, from the JSON of ``bench``."""
    write_numbers(folder, {}, bench)


def write_numbers(folder: Path, verify: Mapping[str, Any], bench: Mapping[str, Any]) -> None:
    """Parity and latency, each from its JSON; an empty one leaves its section as it is."""
    bundle = Bundle.open(folder)
    card = bundle.card
    if bench and measured_as(bundle.artefact_sha256, bench) is None:
        measured = ", ".join(bench["candidates"])
        raise MmdExportError(f"bundle {bundle.name} was not measured; measured were {measured}")
    if verify:
        card = with_section(card, PARITY, parity_markdown(verify), before=LATENCY)
    if bench:
        card = with_section(card, LATENCY, latency_markdown(bench))
    update_card(bundle, card)
