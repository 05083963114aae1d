"""What a model folder says of itself: the licence and the base of its model card, the record of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd_export.checkpoints.weights import read_json
from mmd_export.errors import UsageError

CARD, RECORD = "README.md", "settings.json"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]{0,99}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")  # of a model or of a data set, or a hub id; never a path
_HASH = re.compile(r"[0-9a-f]{64}")
_HUB_DATA = re.compile(r"hf:[\w.-]+(?:/[\w.-]+)?(?:\?[\w.=&-]*)?")


def stated_licence(folder: Path) -> str | None:
    """``license`` in the front matter of the card, as Hugging Face's model cards have it; a plain string or nothing."""
    stated = _front_matter(folder).get("license")
    return stated if isinstance(stated, str) and _LICENCE.fullmatch(stated) else None


def stated_lineage(folder: Path) -> dict[str, str]:
    """``base model`` and ``data``, as a run folder records them; of another folder the ``base_model`` of its card."""
    record = _record(folder)
    settings = record.get("settings")
    if isinstance(settings, Mapping) and "base_sha256" in record:
        base = record.get("base_model", settings.get("model"))  # the id of a hub model
        found = {
            "base model": _with_hash(base, record.get("base_sha256")),
            "data": _with_hash(settings.get("data"), record.get("data_sha256")),
        }
        return {what: text for what, text in found.items() if text}
    base = _front_matter(folder).get("base_model")
    return {"base model": f"`{base}`"} if isinstance(base, str) and _NAME.fullmatch(base) else {}


def stated_seed(folder: Path) -> int | None:
    """Of the noise that a run folder was tuned on; None for another folder."""
    settings = _record(folder).get("settings")
    seed = settings.get("seed") if isinstance(settings, Mapping) else None
    return seed if isinstance(seed, int) else None


def _with_hash(name: Any, digest: Any) -> str:
    """Empty for what is no name: a card shows no path and no text of others."""
    if not isinstance(name, str) or not (_NAME.fullmatch(name) or _HUB_DATA.fullmatch(name)):
        return ""
    known = isinstance(digest, str) and _HASH.fullmatch(digest)
    return f"`{name}`, SHA-256 `{str(digest)[:16]}`" if known else f"`{name}`"


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    except (UsageError, OSError):  # somebody else's file of that name
        return {}


def _front_matter(folder: Path) -> dict[str, Any]:
    """The metadata at the head of the card, as the hub reads it; nothing if it is none."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, YAMLError):  # ValueError: not UTF-8, or no mapping
        return {}
