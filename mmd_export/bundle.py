"""A bundle: a folder with the artefact, golden tensors, a model card and a sealed manifest. No torch here.

Opening a bundle checks all of it; writing one makes a complete folder or none. The same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from mmd_export.batch import BatchSpec
from mmd_export.errors import BundleError, MmdExportError, UsageError
from mmd_export.folders import require_absent, require_writable, staged_folder
from mmd_export.manifest import (
    CARD_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    CheckpointRef,
    DecoderInfo,
    DeferredInfo,
    FileEntry,
    GraphInfo,
    Manifest,
    ManifestDraft,
    TensorSpec,
    Tolerance,
    batch_axis,
    parse_manifest,
    seal,
)

__all__ = [
    "BatchSpec",
    "Bundle",
    "CheckpointRef",
    "DecoderInfo",
    "DeferredInfo",
    "FileEntry",
    "Golden",
    "GraphInfo",
    "Manifest",
    "ManifestDraft",
    "Measured",
    "TensorSpec",
    "Tolerance",
    "batch_axis",
    "require_free",
    "take",
    "update_card",
    "write_bundle",
]

_LARGEST_MANIFEST = 64 * 2**20
_AGAIN = "rebuild the bundle or copy it again"


@dataclass(frozen=True)
class Golden:
    """What the float64 reference gave, rounded to the dtypes of the graph.

    ``inputs``: every graph input by name, ``noise`` (N, C, H, W); ``sample``: as the manifest's output, N images;
    ``states``: float32 (N, C, H, W) after step 1 .. K, the last one before the final clamp or the decoder, whose images
    have another shape. N is a multiple of a static batch size, and at least the smallest one otherwise.
    """

    inputs: Mapping[str, NDArray[Any]]
    sample: NDArray[Any]
    states: tuple[NDArray[np.float32], ...]

    @property
    def noise(self) -> NDArray[np.float32]:
        """Initial noise (N, C, H, W)."""
        return self.inputs["noise"]

    @property
    def step_noise(self) -> NDArray[np.float32] | None:
        """Noise of the noisy steps (S, N, C, H, W), if the plan is stochastic."""
        return self.inputs.get("step_noise")

    @property
    def class_labels(self) -> NDArray[np.int64] | None:
        """Class labels (N,), if the model is class-conditional."""
        return self.inputs.get("class_labels")

    @property
    def count(self) -> int:
        """The number of images N."""
        return len(self.noise)

    @property
    def steps(self) -> int:
        """The number of steps K."""
        return len(self.states)


@dataclass(frozen=True)
class Measured:
    """What a check of the unpublished bundle adds to it; ``unverified``: why there was none."""

    card: str
    parity: Mapping[str, float] | None = None
    unverified: str = ""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte was checked when it was opened."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Check manifest, files, hashes and golden tensors; ``UsageError`` if it is no bundle, else ``BundleError``."""
        place = Path(folder)
        manifest = parse_manifest(_read_manifest(place), place.name or str(place))
        bundle = cls(folder=place, manifest=manifest)
        try:
            _check_files(place, manifest)
            bundle.golden()
        except OSError as error:
            raise BundleError(f"bundle {manifest.name}: cannot be read: {error}; {_AGAIN}") from error
        except BundleError as error:
            if place.name == manifest.name:
                raise
            raise BundleError(f"{place}: {error}") from error  # several bundles may have one name
        return bundle

    @property
    def name(self) -> str:
        """The name in the manifest."""
        return self.manifest.name

    @property
    def artefact_path(self) -> Path:
        """The main artefact: a file, or a folder such as ``model.mlpackage``."""
        return self.folder / self.manifest.artefact

    @property
    def artefact_bytes(self) -> int:
        """The size of the artefact, with its weights (``model.onnx_data``, ``model.bin``): all called ``model``."""
        return sum(entry.size for entry in self._artefact_files)

    @property
    def artefact_sha256(self) -> str:
        """One hash of all files of the artefact; that of the manifest changes with the model card."""
        files = [f"{entry.path} {entry.sha256}" for entry in self._artefact_files]
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    @property
    def _artefact_files(self) -> list[FileEntry]:
        stem = self.manifest.artefact.split(".")[0]
        return [entry for entry in self.manifest.files if entry.path.split("/")[0].split(".")[0] == stem]

    @property
    def gives_latents(self) -> bool:
        """Whether the sample is a latent, which no picture can show."""
        return self.manifest.decoder is None and self.manifest.plan.get("clamp_output") is False

    @property
    def card(self) -> str:
        """The model card."""
        return (self.folder / CARD_NAME).read_text(encoding="utf-8")

    def golden(self) -> Golden:
        """The golden tensors, read once."""
        return self._golden

    @cached_property
    def _golden(self) -> Golden:
        try:
            arrays = safetensors.numpy.load((self.folder / GOLDEN_NAME).read_bytes())
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise BundleError(f"bundle {self.name}: {GOLDEN_NAME} cannot be read: {error}; {_AGAIN}") from error
        return _checked_golden(self.manifest, arrays)


def require_free(out: Path, overwrite: bool = False) -> None:
    """Raise ``UsageError`` if a bundle cannot be put at ``out``; with ``overwrite`` an old bundle may stand there."""
    if not out.absolute().name or out.name == "..":
        raise UsageError(f"{out} cannot be a bundle; choose a folder name for --out")
    require_writable(out)
    if not overwrite or not os.path.lexists(out):
        require_absent(out)
        return
    is_plain_folder = out.is_dir() and not out.is_symlink()
    is_bundle = (out / MANIFEST_NAME).is_file() and (out / GOLDEN_NAME).is_file()
    if not is_plain_folder or not (is_bundle or not any(out.iterdir())):
        raise UsageError(f"{out} is not a bundle, --overwrite replaces bundles only; choose another --out")


def write_bundle(
    out: Path,
    draft: ManifestDraft,
    artefact_writer: Callable[[Path], ManifestDraft | None],
    golden: Mapping[str, NDArray[Any]],
    card: str,
    overwrite: bool = False,
    measure: Callable[[Bundle], Measured] | None = None,
) -> Bundle:
    """Write a bundle that appears at ``out`` complete or not at all.

    ``artefact_writer`` gets the new folder, puts the artefact there, and may return the draft again with what only
    compiling tells (graph, toolchain, hardware). ``measure`` may open and run the complete bundle before it is
    published; what it returns goes into card and manifest, what it raises leaves nothing at ``out``.
    """
    require_free(out, overwrite)
    with staged_folder(out, replace=overwrite) as folder:
        draft = artefact_writer(folder) or draft
        if not (folder / draft.artefact).exists():
            raise MmdExportError(f"bundle {draft.name}: the {draft.target} target wrote no {draft.artefact}")
        contiguous = {name: np.ascontiguousarray(array) for name, array in golden.items()}
        (folder / GOLDEN_NAME).write_bytes(safetensors.numpy.save(contiguous))
        bundle = _finish(folder, draft, card)
        if measure is not None:
            bundle = _apply(bundle, measure(bundle))
    return Bundle(folder=Path(out), manifest=bundle.manifest)


def update_card(bundle: Bundle, card: str, parity: Mapping[str, float] | None = None) -> Bundle:
    """Replace the model card (and the measured parity, if given) and seal again, in one step."""
    place = bundle.folder.resolve()
    with staged_folder(place, replace=True) as folder:
        (folder / MANIFEST_NAME).write_bytes(bundle.manifest.to_bytes())
        for entry in bundle.manifest.files:
            _link_or_copy(place / entry.path, folder / entry.path)
        unchanged = Bundle.open(folder)
        (folder / CARD_NAME).unlink()  # the name only: the published bundle keeps its file
        updated = _apply(unchanged, Measured(card, parity))
    return Bundle(folder=bundle.folder, manifest=updated.manifest)


def _finish(folder: Path, draft: ManifestDraft, card: str) -> Bundle:
    """Write card and manifest for the files that lie in the folder, and read all of it back."""
    (folder / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")
    paths = _regular_files(folder, draft.name)
    manifest = seal(draft, tuple(_entry(folder, path) for path in paths if path != MANIFEST_NAME))
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return Bundle.open(folder)


def _apply(bundle: Bundle, measured: Measured) -> Bundle:
    """The bundle with its new card and parity; only for a folder that is not published."""
    draft: ManifestDraft = bundle.manifest
    if measured.parity is not None:
        draft = draft.model_copy(update={"parity": {name: float(value) for name, value in measured.parity.items()}})
    return _finish(bundle.folder, draft, measured.card)


def _link_or_copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _entry(folder: Path, path: str) -> FileEntry:
    return FileEntry(path=path, size=(folder / path).stat().st_size, sha256=_sha256(folder / path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    try:
        status = path.lstat()
    except (OSError, ValueError):
        if folder.is_file() and (folder.parent / MANIFEST_NAME).is_file():
            raise UsageError(f"{folder} is a file of a bundle; give its folder {folder.parent}") from None
        reason = f"it has no {MANIFEST_NAME}" if folder.is_dir() else "there is no such folder"
        reason = "it is a file" if folder.is_file() else reason
        raise UsageError(f"{folder} is not a bundle: {reason}; make one with mmd-export build --out") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_MANIFEST:
        raise BundleError(f"bundle {folder.name}: {MANIFEST_NAME} is no plain file of at most 64 MiB; {_AGAIN}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"bundle {folder.name}: {MANIFEST_NAME} cannot be read: {error}; {_AGAIN}") from error


def _regular_files(folder: Path, bundle: str) -> list[str]:
    """Relative POSIX paths of all files, sorted; a link or a device is an error. Nothing is opened or followed."""
    found: list[str] = []
    for root, folders, names in os.walk(folder, onerror=_reraise):
        for name in (*folders, *names):
            path = Path(root) / name
            mode, relative = path.lstat().st_mode, path.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                found.append(relative)
            elif not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
                raise BundleError(f"bundle {bundle}: {relative!r} is {kind}; {_AGAIN}")
    return sorted(found)


def _reraise(error: OSError) -> None:
    raise error


def _check_files(folder: Path, manifest: Manifest) -> None:
    present, listed = _regular_files(folder, manifest.name), {entry.path for entry in manifest.files}
    where = f"bundle {manifest.name}:"
    for path in present:
        if path not in listed and path != MANIFEST_NAME:
            raise BundleError(f"{where} {path!r} is not in its manifest; delete that file or {_AGAIN}")
    for entry in manifest.files:
        if entry.path not in present:
            raise BundleError(f"{where} {entry.path!r} is missing; {_AGAIN}")
        size = (folder / entry.path).stat().st_size
        if size != entry.size:
            raise BundleError(f"{where} {entry.path!r} has {size} bytes, the manifest says {entry.size}; {_AGAIN}")
    for entry in manifest.files:
        digest = _sha256(folder / entry.path)
        if digest != entry.sha256:
            raise BundleError(
                f"{where} {entry.path!r} has SHA-256 {digest}, the manifest says {entry.sha256}; {_AGAIN}"
            )


def _checked_golden(manifest: Manifest, arrays: dict[str, NDArray[Any]]) -> Golden:
    """The golden arrays, after their names, dtypes, shapes and values were compared with the manifest."""
    where = f"bundle {manifest.name}: {GOLDEN_NAME}"
    steps = sum(1 for name in arrays if re.fullmatch(r"state\.[1-9][0-9]*", name))
    planned = manifest.plan.get("steps")
    if steps < 1 or (isinstance(planned, list) and len(planned) != steps):
        says = f"{len(planned)} steps" if isinstance(planned, list) else "at least one"
        raise BundleError(f"{where} holds {steps} states, the plan has {says}; {_AGAIN}")
    noise = manifest.spec("noise")
    states = [noise.model_copy(update={"name": f"state.{step}"}) for step in range(1, steps + 1)]
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs, *states)}
    if set(arrays) != set(specs):
        raise BundleError(f"{where} holds {sorted(arrays)}, the manifest says {sorted(specs)}; {_AGAIN}")
    count = arrays["noise"].shape[0] if arrays["noise"].ndim else 0
    batch = manifest.batch
    if count < batch.smallest or (batch.is_static and count % batch.smallest):
        raise BundleError(f"{where} holds {count} images, which batch {batch} cannot run unpadded; {_AGAIN}")
    for name, spec in specs.items():
        _check_golden_array(where, arrays[name], spec, count)
    return Golden(
        inputs={spec.name: arrays[spec.name] for spec in manifest.inputs},
        sample=arrays["sample"],
        states=tuple(arrays[spec.name] for spec in states),
    )


def _check_golden_array(where: str, array: NDArray[Any], spec: TensorSpec, count: int) -> None:
    shape = tuple(count if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape))
    if array.dtype.name != spec.dtype or array.shape != shape:
        found, says = f"{array.dtype.name} {array.shape}", f"{spec.dtype} {shape}"
        raise BundleError(f"{where}: '{spec.name}' is {found}, the manifest says {says}; {_AGAIN}")
    if not np.isfinite(array).all():
        raise BundleError(f"{where}: '{spec.name}' holds {int((~np.isfinite(array)).sum())} NaN or infinite values")


def take(name: str, array: NDArray[Any], rows: slice) -> NDArray[Any]:
    """The images ``rows`` of an input; those of ``step_noise`` lie on axis 1."""
    return np.ascontiguousarray(array[:, rows] if batch_axis(name) else array[rows])
