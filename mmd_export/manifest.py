"""What a bundle says about itself: the models behind ``manifest.json``, its one canonical form and its seal.

``manifest_sha256`` is the SHA-256 of the canonical JSON of all other fields, and the file must be byte for byte the
canonical form, so a change of any byte of it is caught. ``python -m mmd_export.manifest`` prints the JSON Schema.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mmd_export.batch import BatchSpec, Positive
from mmd_export.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
GOLDEN_NAME = "golden.safetensors"
CARD_NAME = "README.md"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]

# A POSIX or Windows absolute path at the start of a string or after a separator; "https://..." does not match.
_ABSOLUTE_PATH = re.compile(r"""(?:^|[\s:='"(,])(?:/[^/\s]+/|[A-Za-z]:[\\/]|\\\\)""")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Model):
    """One input or output. A dimension is a number, or "batch" where the graph takes several batch sizes.

    ``below``: int64 values lie in 0 ... below - 1; absent where the range is not known.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]
    dtype: Literal["float32", "int64", "uint8"]
    shape: tuple[Positive | Literal["batch"], ...]
    below: Positive | None = None

    @model_validator(mode="after")
    def _range_of_whole_numbers(self) -> Self:
        if self.below is not None and self.dtype != "int64":
            raise ValueError(f"below is {self.below}, dtype {self.dtype}; only int64 has a range")
        return self

    @model_serializer(mode="wrap")
    def _without_unknown_range(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = whole(self)
        return {name: value for name, value in fields.items() if name != "below" or value is not None}

    @property
    def batch_axis(self) -> int:
        """The axis along which images are stacked."""
        return batch_axis(self.name)


class CheckpointRef(_Model):
    """Where the weights come from: a name without any local path, the hash of the weights, the licence if known.

    ``options``: what was chosen about the network (guidance, length of the text); absent if nothing was. The hash
    covers them.
    """

    name: Annotated[str, Field(min_length=1)]
    sha256: Sha256
    licence: str | None = None
    options: dict[str, int | Finite | str] = {}

    @model_serializer(mode="wrap")
    def _without_empty_options(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = whole(self)
        return fields if self.options else {name: value for name, value in fields.items() if name != "options"}


class DecoderInfo(_Model):
    """The decoder at the end of the graph: image = D(latent / scale + shift), in a precision of its own.

    With statistics of each channel it is D(latent std / scale + mean); without them the manifest leaves both out.
    """

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"mean": ["std"], "std": ["mean"]}})

    autoencoder: Annotated[str, Field(min_length=1)]
    scale: Finite
    shift: Finite
    mean: tuple[Finite, ...] = ()
    std: tuple[Finite, ...] = ()
    precision: Word

    @model_validator(mode="after")
    def _can_be_computed(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std {len(self.std)}; each channel has both")
        if self.scale == 0.0 or 0.0 in self.std:
            raise ValueError(f"scale is {self.scale:g} and std {list(self.std)}; a latent times 0 is none")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_statistics(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = whole(self)
        return fields if self.std else {name: value for name, value in fields.items() if name not in ("mean", "std")}


class Tolerance(_Model):
    """How far the artefact may be from the float64 reference, and the measurement that set it."""

    atol: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    reason: Annotated[str, Field(min_length=1)]


class GraphInfo(_Model):
    """Size of the graph; weights are counted once, the body of a loop too.

    ``folded_values``: tensors that the fixed time grid made constant, over all calls. ``peak_activation_bytes``: the
    most that is alive at once at the smallest batch, weights aside, by shapes alone. ``device``: what its form is for,
    where that is not any device.
    """

    nodes: Annotated[int, Field(ge=0)]
    unique_weight_bytes: Annotated[int, Field(ge=0)]
    op_counts: dict[str, int]
    form: Literal["unrolled", "loop"] = "unrolled"
    folded_values: Annotated[int, Field(ge=0)] = 0
    folded_bytes: Annotated[int, Field(ge=0)] = 0
    peak_activation_bytes: Annotated[int, Field(ge=0)] | None = None
    device: Literal["cpu"] | None = None


class DeferredInfo(_Model):
    """What a bundle is still to be compiled to, where it will run; until then its artefact is the typed ONNX graph.

    ``options``: those of the target, as on the command line.
    """

    format: Word
    artefact: str
    options: dict[str, int | str] = {}


class FileEntry(_Model):
    """One file of the bundle: relative POSIX path, size in bytes, SHA-256."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _inside_the_folder(cls, path: str) -> str:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c in "\\:" or not c.isprintable() for c in path):
            raise ValueError(f"{path!r} is not a plain relative path")
        if path == MANIFEST_NAME:
            raise ValueError(f"{path!r} cannot list itself")
        return path


class ManifestDraft(_Model):
    """Everything a builder knows before the files are hashed."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=200)]
    target: Word
    format: Word
    artefact: str
    precision: Word
    plan: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchSpec
    checkpoint: CheckpointRef
    decoder: DecoderInfo | None = None
    toolchain: dict[str, str]
    hardware: dict[str, str] | None = None
    tolerance: Tolerance
    parity: dict[str, Finite] | None = None
    graph: GraphInfo
    deferred: DeferredInfo | None = None

    @model_serializer(mode="wrap")
    def _without_empty_recipe(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Bundles that are not deferred have no such field, as those of older releases."""
        fields: dict[str, Any] = whole(self)
        return fields if self.deferred is not None else {name: fields[name] for name in fields if name != "deferred"}

    @field_validator("name")
    @classmethod
    def _one_printable_word(cls, name: str) -> str:
        if not name.isprintable() or "/" in name or "\\" in name:
            raise ValueError(f"{name!r} is not a printable name without slashes")
        return name

    @field_validator("artefact")
    @classmethod
    def _plain_file_name(cls, artefact: str) -> str:
        FileEntry(path=artefact, size=0, sha256="0" * 64)
        if artefact in (GOLDEN_NAME, CARD_NAME):
            raise ValueError(f"{artefact!r} is taken by another file of the bundle")
        return artefact

    @field_validator("plan", mode="after")
    @classmethod
    def _plain_json(cls, plan: dict[str, Any]) -> dict[str, Any]:
        try:
            plain: dict[str, Any] = json.loads(json.dumps(plan, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"plan is not plain JSON: {error}") from None
        return plain

    @model_validator(mode="after")
    def _specs_agree(self) -> Self:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names) or "noise" not in names or "sample" not in names:
            raise ValueError(f"inputs and outputs {names} are not distinct names with 'noise' and 'sample'")
        for spec in (*self.inputs, *self.outputs):
            if len(spec.shape) <= spec.batch_axis or "batch" in spec.shape[: spec.batch_axis]:
                raise ValueError(f"{spec.name!r} is {list(spec.shape)}, its batch belongs on axis {spec.batch_axis}")
            size = spec.shape[spec.batch_axis]
            if size != "batch" and not (self.batch.is_static and size == self.batch.smallest):
                raise ValueError(f"{spec.name!r} has batch {size}, the bundle's batch is {self.batch}")
        return self

    @model_validator(mode="after")
    def _no_local_path(self) -> Self:
        for text in _strings(self.model_dump(mode="json")):
            if _ABSOLUTE_PATH.search(text):
                raise ValueError(f"{text!r} holds a path of the building machine")
        return self

    def spec(self, name: str) -> TensorSpec:
        """The input or output of that name."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)


class Manifest(ManifestDraft):
    """The content of ``manifest.json``."""

    files: tuple[FileEntry, ...]
    manifest_sha256: Sha256

    @model_validator(mode="after")
    def _files_complete(self) -> Self:
        paths = [entry.path for entry in self.files]
        if paths != sorted(paths) or len({path.casefold() for path in paths}) != len(paths):
            raise ValueError("files are not sorted and distinct")
        artefact = [path for path in paths if path == self.artefact or path.startswith(f"{self.artefact}/")]
        for name, found in ((self.artefact, artefact), (GOLDEN_NAME, paths), (CARD_NAME, paths)):
            if not found or (found is paths and name not in paths):
                raise ValueError(f"files do not list {name!r}")
        return self

    def to_bytes(self) -> bytes:
        """The one canonical form, as stored in ``manifest.json``."""
        return canonical_json(self.model_dump(mode="json"))


def batch_axis(name: str) -> int:
    """``step_noise`` is (S, B, C, H, W), everything else has its batch first."""
    return 1 if name == "step_noise" else 0


def canonical_json(fields: Mapping[str, Any]) -> bytes:
    """Sorted keys, indent 1, ASCII, one trailing newline, no NaN or infinity."""
    return (json.dumps(fields, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def seal(draft: ManifestDraft, files: tuple[FileEntry, ...]) -> Manifest:
    """The draft with its files and its own hash."""
    own = {name: value for name, value in draft.model_dump(mode="json").items() if name in ManifestDraft.model_fields}
    fields = own | {"files": [entry.model_dump(mode="json") for entry in files]}
    try:
        return Manifest.model_validate(fields | {"manifest_sha256": hashlib.sha256(canonical_json(fields)).hexdigest()})
    except ValidationError as error:
        raise BundleError(f"bundle {draft.name}: its manifest cannot be written: {_first(error)}") from error


def parse_manifest(data: bytes, bundle: str) -> Manifest:
    """Read and check ``manifest.json``; any byte that is not the canonical form of a sealed manifest is an error."""
    where, again = f"bundle {bundle}: {MANIFEST_NAME}", "rebuild the bundle or copy it again"
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not readable JSON ({error}); {again}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r}, this mmd-export reads {SCHEMA_VERSION}; "
            "use the version of mmd-export that built it, or rebuild the bundle"
        )
    try:
        manifest = Manifest.model_validate(raw)
        canonical = manifest.to_bytes()
    except (ValidationError, ValueError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else str(error)
        raise BundleError(f"{where} is not valid: {reason}; {again}") from error
    fields = {name: value for name, value in manifest.model_dump(mode="json").items() if name != "manifest_sha256"}
    digest = hashlib.sha256(canonical_json(fields)).hexdigest()
    if digest != manifest.manifest_sha256:
        raise BundleError(f"{where} was changed: its hash is {digest}, it says {manifest.manifest_sha256}; {again}")
    if canonical != data:
        raise BundleError(f"{where} was changed: it is not in canonical form ({_difference(data, canonical)}); {again}")
    return manifest


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic in one line."""
    first, count = error.errors()[0], error.error_count()
    place = ".".join(str(part) for part in first["loc"])
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    return (f"{place}: " if place else "") + message + (f" (and {count - 1} more)" if count > 1 else "")


def _difference(found: bytes, expected: bytes) -> str:
    same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    place = min(len(found), len(expected)) if same is None else same
    return f"{len(found)} bytes for {len(expected)}, the first difference at byte {place}"


def schema_text() -> str:
    """The published JSON Schema of ``manifest.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, sort_keys=True, indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
