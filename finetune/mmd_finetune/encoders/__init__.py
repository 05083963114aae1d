"""Encoders: one file a family, found by file name, one ``FAMILY`` in it. What each name means: docs/encoders.md."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from mmd_export.errors import UsageError
from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source


@functools.cache
def families() -> dict[str, Family]:
    """Every word that may stand before the colon, and its family."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Family] = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {kind: family for family in found for kind in family.kinds}


def encoder_forms() -> list[str]:
    """How every encoder is written; the built-in names first."""
    forms = dict.fromkeys(form for family in families().values() for form in family.forms)
    return sorted(forms, key=lambda form: (":" in form, form))


def load_encoder(spec: str) -> Encoder:
    """The encoder that ``spec`` names: frozen, eval mode, float32. Only a hub id uses the network.

    Raises UsageError that names the encoder and the file at fault, or lists the names.
    """
    source = Source.parse(spec)
    family = families().get(source.kind)
    if family is None or bool(source.place) != bool(family.place):
        raise UsageError(f"encoder {spec!r} is unknown; known: {', '.join(encoder_forms())}")
    try:
        return family.load(source)
    except UsageError as error:
        if str(error).startswith("encoder "):
            raise
        raise UsageError(f"encoder {source.name}: {error}") from error  # of a file that other commands read, too
