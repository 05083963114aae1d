"""What an embed kit writes: a project that builds and runs as it lies, with the bundle in it. No torch.

The sources of a kit are plain files: ``runtimes/<kit>/`` in a checkout, ``mmd_export/kits/files/<kit>/`` in the wheel.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from mmd_export.bundle import Bundle, Manifest
from mmd_export.errors import MmdExportError
from mmd_export.manifest import MANIFEST_NAME

README_NAME = "README.md"
LICENCE_FILES = ("LICENSE", "NOTICE")

# What building or running a kit's sources leaves in their folder; no part of a project.
MADE_THERE = frozenset({
    ".build", ".cache", ".mypy_cache", ".pytest_cache", ".swiftpm", ".venv", "__pycache__", "build", "bundle", "dist",
    "node_modules",
})  # fmt: skip

# What the commands of the kits can draw: other inputs are for programs, as are samples of other channels, like latents.
MADE_OF_A_SEED = frozenset({"noise", "step_noise"})
PICTURES = (1, 3)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """What a project fetches or links besides its own sources."""

    name: str
    licence: str
    source: str


@runtime_checkable
class Kit(Protocol):
    """Turns a bundle into a project in one language. ``formats``: the artefact formats it takes, as in the manifest."""

    name: str
    summary: str
    formats: tuple[str, ...]
    libraries: tuple[Library, ...]

    def lines(self, manifest: Manifest) -> tuple[str, ...]:
        """What builds and runs a project with such a bundle; said after it was written, and in its README."""
        ...

    def write(self, bundle: Bundle, folder: Path) -> None:
        """Put the project into the empty ``folder``; licences and ``kit.json`` are added by the caller."""
        ...


@dataclass(frozen=True)
class SourceKit:
    """A kit whose project is its sources as they lie, and the bundle at ``bundle_at``.

    ``run``: the lines that build and run it, after those that ``before`` has for the format of its artefact.
    ``sources``: their folder, if it is not called as the kit. ``parts``: sources that kits share, by their folder in
    ``runtimes/``, each with its place in the project.
    """

    name: str
    summary: str
    formats: tuple[str, ...]
    libraries: tuple[Library, ...]
    run: tuple[str, ...]
    bundle_at: str = "bundle"
    sources: str = ""
    before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[tuple[str, str], ...] = ()

    def lines(self, manifest: Manifest) -> tuple[str, ...]:
        """Those for the format, then those for all that the bundle can do."""
        lines = (*self.before.get(manifest.format, ()), *self.run)
        return tuple(fitted for line in lines if (fitted := _fitted(line, manifest)) is not None)

    def write(self, bundle: Bundle, folder: Path) -> None:
        """Sources, then the bundle, then what the README says of this bundle."""
        copy_sources(self.sources or self.name, folder)
        for part, place in self.parts:
            copy_sources(part, folder / place)
        copy_bundle(bundle, folder / self.bundle_at)
        readme = folder / README_NAME
        text = readme.read_text(encoding="utf-8").rstrip("\n")
        fitted = (_fitted(line, bundle.manifest) if line in self.run else line for line in text.splitlines())
        text = "\n".join(line for line in fitted if line is not None)
        about = about_bundle(bundle, self.bundle_at)
        readme.write_text(f"{text}\n\n{about}", encoding="utf-8", newline="\n")


def _fitted(line: str, manifest: Manifest) -> str | None:
    """A line that draws from a seed, with class 0 where there are classes; None where that gives no picture."""
    if " --seed " not in line:
        return line
    sample, inputs = manifest.spec("sample"), {spec.name for spec in manifest.inputs}
    channels = sample.shape[-1] if sample.dtype == "uint8" else sample.shape[1]
    if inputs - MADE_OF_A_SEED - {"class_labels"} or channels not in PICTURES:
        return None
    return f"{line} --class-label 0" if "class_labels" in inputs else line


def source_folder(name: str) -> Path:
    """Where the sources of a kit lie: inside the installed package, or in the checkout that it is imported from."""
    places = (_HERE / "kits/files" / name, _HERE.parent / "runtimes" / name)
    for place in places:
        if place.is_dir():
            return place
    raise MmdExportError(f"the sources of kit {name} are not in this installation of mmd-export; install it again")


def source_files(folder: Path) -> Iterator[str]:
    """Relative POSIX paths of the sources in ``folder``, sorted, without what building them left there."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not MADE_THERE & set(relative.parts):
            yield relative.as_posix()


def copy_sources(name: str, folder: Path) -> None:
    """The sources of the kit ``name``, into ``folder``."""
    source = source_folder(name)
    for path in source_files(source):
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, place)


def copy_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of ``bundle`` at ``folder``, opened: every byte of it was checked again."""
    for path in (MANIFEST_NAME, *(entry.path for entry in bundle.manifest.files)):
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / path, place)
    return Bundle.open(folder)


def licence_files() -> Iterator[Path]:
    """The licence and the notice of mmd-export, of which a kit's sources are a part."""
    for name in LICENCE_FILES:
        places = [place for place in (_HERE / "kits/files" / name, _HERE.parent / name) if place.is_file()]
        if not places:
            raise MmdExportError(f"{name} is not in this installation of mmd-export; install it again")
        yield places[0]


def about_bundle(bundle: Bundle, place: str) -> str:
    """The section of a README on the bundle in the project: Markdown."""
    manifest = bundle.manifest
    specs = [(spec, "in") for spec in manifest.inputs] + [(spec, "out") for spec in manifest.outputs]
    rows = [
        ("bundle", f"`{place}/`, called {manifest.name}"),
        ("artefact", f"`{manifest.artefact}`, format {manifest.format}, precision {manifest.precision}"),
        *((f"{way} `{spec.name}`", f"{spec.dtype} ({', '.join(map(str, spec.shape))})") for spec, way in specs),
        ("batch", str(manifest.batch)),
        ("tolerance", f"{manifest.tolerance.atol:g}: {manifest.tolerance.reason}"),
        ("licence of the weights", manifest.checkpoint.licence or "not stated by the checkpoint"),
    ]
    lines = ["## The bundle in this project", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), ""])


def licence_notes(bundle: Bundle, kit: Kit) -> str:
    """``LICENSES.md``: what is in the project and under which terms."""
    checkpoint = bundle.manifest.checkpoint
    weights = checkpoint.licence or "**not stated by the checkpoint: ask its authors before you ship it**"
    lines = [
        "# Licences of what is here",
        "",
        "| part | licence |",
        "|---|---|",
        "| the sources of this project | Apache-2.0: `LICENSE`, `NOTICE` |",
        f"| the weights of {checkpoint.name}, in the bundle | {weights} |",
        *(f"| {library.name}, from {library.source} | {library.licence} |" for library in kit.libraries),
        "",
        "The libraries are not part of this project; their own packages carry their full terms.",
        "",
    ]
    return "\n".join(lines)
