"""``mmd-export embed``: a bundle as a small project in the language of an app."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mmd_export import __version__
from mmd_export.bundle import Bundle, Manifest
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.folders import require_absent, staged_folder
from mmd_export.kit_project import Kit, licence_files, licence_notes
from mmd_export.kits import get_kit, kit_names

MARK = "kit.json"  # says which kit wrote the project, and for which bundle


@dataclass(frozen=True)
class EmbedOptions:
    """What ``mmd-export embed`` takes."""

    bundle: Path
    kit: str
    out: Path
    overwrite: bool = False


@dataclass(frozen=True)
class Embedded:
    """A project that was written: what it is, and the lines that build and run it."""

    summary: str
    lines: tuple[str, ...]


def embed(options: EmbedOptions) -> Embedded:
    """Open the bundle, which checks its hashes, and write the project; it appears complete or not at all."""
    kit = get_kit(options.kit)
    bundle = Bundle.open(options.bundle)
    _require_fitting(kit, bundle)
    _require_free(options.out, options.bundle, options.overwrite)
    with staged_folder(options.out, replace=options.overwrite) as folder:
        kit.write(bundle, folder)
        for path in licence_files():
            shutil.copy(path, folder)
        (folder / "LICENSES.md").write_text(licence_notes(bundle, kit), encoding="utf-8", newline="\n")
        (folder / MARK).write_text(_mark(kit, bundle), encoding="utf-8", newline="\n")
    return Embedded(kit.summary, kit.lines(bundle.manifest))


def _require_fitting(kit: Kit, bundle: Bundle) -> None:
    """Raise NotAvailableError unless the kit runs what the bundle holds."""
    manifest = bundle.manifest
    if manifest.deferred is not None:
        raise NotAvailableError(
            f"bundle {bundle.name} is still to be compiled to {manifest.deferred.format}, kit {kit.name} takes "
            "compiled ones; run mmd-export finalize first"
        )
    if manifest.format not in kit.formats:
        others = [name for name in kit_names() if manifest.format in get_kit(name).formats]
        instead = f"; kits for {manifest.format}: {', '.join(others)}" if others else ""
        raise NotAvailableError(
            f"bundle {bundle.name} holds format {manifest.format}, kit {kit.name} takes {' or '.join(kit.formats)}; "
            f"build for a target of such a format{instead}"
        )
    if _lacks_weights(manifest):
        raise NotAvailableError(
            f"bundle {bundle.name} holds an engine without its weights, which kit {kit.name} does not put back; "
            "build it without --strip-weights"
        )


def _lacks_weights(manifest: Manifest) -> bool:
    """Whether the engine takes its weights from a graph beside it, which ``mmd_runtime`` alone can do."""
    beside = (entry.path for entry in manifest.files if entry.path != manifest.artefact)
    return manifest.format == "tensorrt" and any(path.endswith(".onnx") for path in beside)


def _require_free(out: Path, bundle: Path, overwrite: bool) -> None:
    """Raise UsageError if no project can be put at ``out``; with ``overwrite`` an old project may stand there."""
    if not out.absolute().name or out.name == "..":
        raise UsageError(f"{out} cannot be a project; choose a folder name for --out")
    inside = bundle.resolve() == out.resolve() or out.resolve() in bundle.resolve().parents
    if inside or bundle.resolve() in out.resolve().parents:
        raise UsageError(f"--out {out} and the bundle {bundle} lie in each other; choose another --out")
    if not overwrite or not os.path.lexists(out):
        require_absent(out)
        return
    is_project = out.is_dir() and not out.is_symlink() and ((out / MARK).is_file() or not any(out.iterdir()))
    if not is_project:
        raise UsageError(f"{out} has no {MARK}, --overwrite replaces projects of embed only; choose another --out")


def _mark(kit: Kit, bundle: Bundle) -> str:
    """Which kit, which bundle, which release; no time, so that the same inputs give the same bytes."""
    facts = {
        "kit": kit.name, "mmd_export": __version__, "bundle": bundle.name,
        "manifest_sha256": bundle.manifest.manifest_sha256,
    }  # fmt: skip
    return json.dumps(facts, sort_keys=True, indent=1) + "\n"
