"""Damaged bundles, the same for every kit: ``python -m tests.attacks BUNDLE OUT`` writes one folder an attack.

``OUT/index.json`` lists them: ``id``, ``what`` was done, ``says``: what the one-line refusal of every kit contains, and
``needs_listing``: only a reader that lists the folder can see it, so one that fetches files by name may skip it. Those
with ``sealed`` have a right ``manifest_sha256``: the reader must look at the content.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mmd_export.manifest import GOLDEN_NAME, MANIFEST_NAME, canonical_json

Fields = dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """One way to damage a copy of a bundle."""

    id: str
    what: str
    says: str
    damage: Callable[[Path], object]
    sealed: bool = False
    needs_listing: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "damage"}


def write_attacks(bundle: Path, out: Path) -> list[Attack]:
    """One damaged copy of ``bundle`` an attack, and the index."""
    for attack in ATTACKS:
        place = out / attack.id
        shutil.copytree(bundle, place)
        attack.damage(place)
    index = {"bundle": bundle.name, "attacks": [attack.to_dict() for attack in ATTACKS]}
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return list(ATTACKS)


def artefact_of(folder: Path) -> Path:
    """The largest file of the artefact, which may be a folder."""
    fields = json.loads((folder / MANIFEST_NAME).read_bytes())
    inside = [entry for entry in fields["files"] if entry["path"].split("/")[0] == fields["artefact"]]
    return folder / str(max(inside, key=lambda entry: int(entry["size"]))["path"])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def seal(text: bytes) -> bytes:
    """The text of a manifest with the hash that its other lines have."""
    lines = text.split(b"\n")
    at = next(i for i, line in enumerate(lines) if line.startswith(b' "manifest_sha256": '))
    digest = hashlib.sha256(b"\n".join(lines[:at] + lines[at + 1 :])).hexdigest()
    lines[at] = f' "manifest_sha256": "{digest}",'.encode()
    return b"\n".join(lines)


def fields_with(change: Callable[[Fields], object]) -> Callable[[Path], None]:
    """Change the manifest as an attacker would: in canonical form, with a right hash."""

    def damage(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        fields = json.loads(path.read_bytes())
        change(fields)
        path.write_bytes(seal(canonical_json(fields)))

    return damage


def text_with(old: str, new: str) -> Callable[[Path], None]:
    """Replace the first ``old`` in the text of the manifest, with a right hash."""

    def damage(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        text = path.read_bytes()
        assert old.encode() in text, f"{old!r} is not in the manifest"
        path.write_bytes(seal(text.replace(old.encode(), new.encode(), 1)))

    return damage


def unsealed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the manifest's bytes as an accident would."""

    def damage(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        before = path.read_bytes()
        after = change(before)
        assert after != before
        path.write_bytes(after)

    return damage


def golden_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another golden file, rightly listed in the manifest."""

    def damage(folder: Path) -> None:
        data = change((folder / GOLDEN_NAME).read_bytes())
        (folder / GOLDEN_NAME).write_bytes(data)
        entry = {"path": GOLDEN_NAME, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        def relist(fields: Fields) -> None:
            fields["files"] = [entry if old["path"] == GOLDEN_NAME else old for old in fields["files"]]

        fields_with(relist)(folder)

    return damage


def golden_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The golden file with other tensors."""

    def rewrite(data: bytes) -> bytes:
        arrays: dict[str, Any] = {name: array.copy() for name, array in safetensors.numpy.load(data).items()}
        change(arrays)
        saved: bytes = safetensors.numpy.save(arrays)
        return saved

    return golden_bytes(rewrite)


def header_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The golden file with another header before the same data."""

    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return golden_bytes(rewrite)


def listing(path: str) -> Callable[[Path], None]:
    """One more file in the manifest, first in the list as its name sorts, at a place that is not inside."""
    entry = {"path": path, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    return fields_with(lambda fields: fields["files"].insert(0, entry))


def link(folder: Path) -> None:
    artefact = artefact_of(folder)
    moved = folder.with_name(f"{folder.name}.moved")
    artefact.rename(moved)
    artefact.symlink_to(moved)


def to_nan(arrays: dict[str, Any]) -> None:
    arrays["sample"] = np.full_like(arrays["sample"], np.nan)


HASH, SIZE, MISSING = "has SHA-256", "bytes, the manifest says", "is missing"
JSON, CHANGED, GOLDEN = "is not readable JSON", "was changed", "golden.safetensors cannot be read"
CLIMBS = "is not a plain relative path"

ATTACKS = (
    Attack("edited-artefact", "one bit of the artefact", HASH, lambda f: flip(artefact_of(f), -20)),
    Attack("edited-golden", "one bit of the golden file", HASH, lambda f: flip(f / GOLDEN_NAME, -3)),
    Attack("edited-card", "one bit of the model card", HASH, lambda f: flip(f / "README.md", 0)),
    Attack("missing-artefact", "no artefact", MISSING, lambda f: artefact_of(f).unlink()),
    Attack("missing-golden", "no golden file", MISSING, lambda f: (f / GOLDEN_NAME).unlink()),
    Attack("cut-artefact", "the artefact without its last byte", SIZE,
           lambda f: artefact_of(f).write_bytes(artefact_of(f).read_bytes()[:-1])),
    Attack("grown-golden", "a byte after the golden file", SIZE,
           lambda f: (f / GOLDEN_NAME).write_bytes((f / GOLDEN_NAME).read_bytes() + b"\0")),
    Attack("empty-manifest", "a manifest of no bytes", JSON, unsealed(lambda _: b"")),
    Attack("cut-manifest", "half of the manifest", JSON, unsealed(lambda text: text[: len(text) // 2])),
    Attack("no-json", "a manifest that is a picture", JSON, unsealed(lambda _: b"\x89PNG\r\n\x1a\n")),
    Attack("deep-json", "a manifest of 100,000 brackets", JSON, unsealed(lambda _: b"[" * 100_000)),
    Attack("loose-tolerance", "a larger tolerance, the old hash", CHANGED,
           unsealed(lambda text: text.replace(b'"atol": ', b'"atol": 1', 1))),
    Attack("edited-seal", "another hash of the manifest", CHANGED,
           unsealed(lambda text: re.sub(rb'(?<="manifest_sha256": ")[0-9a-f]{64}', b"0" * 64, text))),
    Attack("next-schema", "schema version 2", "has schema version 2",
           fields_with(lambda fields: fields.update(schema_version=2)), sealed=True),
    Attack("no-schema", "no schema version", "has schema version",
           fields_with(lambda fields: fields.pop("schema_version")), sealed=True),
    Attack("text-schema", "the schema version as text", "has schema version",
           fields_with(lambda fields: fields.update(schema_version="1")), sealed=True),
    Attack("climbing-path", "a listed file above the folder", CLIMBS, listing("../outside"), sealed=True),
    Attack("hidden-climb", "a listed file above the folder, by a detour", CLIMBS, listing("a/../../outside"),
           sealed=True),
    Attack("absolute-path", "a listed file at the root", CLIMBS, listing("/etc/hostname"), sealed=True),
    Attack("backslash-path", "a listed file above the folder, as Windows writes it", CLIMBS, listing("..\\outside"),
           sealed=True),
    Attack("drive-path", "a listed file on another drive", CLIMBS, listing("C:outside"), sealed=True),
    Attack("empty-path", "a listed file without a name", CLIMBS, listing(""), sealed=True),
    Attack("double-slash", "a listed file with an empty folder", CLIMBS, listing("a//b"), sealed=True),
    Attack("nul-path", "a listed file with a zero byte in its name", CLIMBS, listing("a\0b"), sealed=True),
    Attack("climbing-artefact", "an artefact above the folder", CLIMBS,
           fields_with(lambda fields: fields.update(artefact="../model.onnx")), sealed=True),
    Attack("unlisted-artefact", "an artefact that is not listed", "do not list",
           fields_with(lambda fields: fields.update(artefact="other.onnx")), sealed=True),
    Attack("listed-twice", "a file listed twice", "are not sorted and distinct",
           fields_with(lambda fields: fields["files"].insert(0, fields["files"][0])), sealed=True),
    Attack("doubled-key", "a key that stands twice", "stands twice",
           text_with('\n "artefact": ', '\n "artefact": "other.onnx",\n "artefact": '), sealed=True),
    Attack("doubled-inner-key", "a key that stands twice in an inner object", "stands twice",
           text_with('\n  "atol": ', '\n  "atol": 9,\n  "atol": '), sealed=True),
    Attack("no-tolerance", "no tolerance", "is not valid: tolerance",
           fields_with(lambda fields: fields.pop("tolerance")), sealed=True),
    Attack("text-tolerance", "a tolerance that is no number", "is not valid: tolerance.atol",
           fields_with(lambda fields: fields["tolerance"].update(atol="much")), sealed=True),
    Attack("nan-tolerance", "a tolerance that is not a number", JSON,
           text_with('"atol": ', '"atol": NaN, "was": '), sealed=True),
    Attack("negative-tolerance", "a tolerance below zero", "is not valid: tolerance.atol",
           fields_with(lambda fields: fields["tolerance"].update(atol=-1.0)), sealed=True),
    Attack("huge-size", "a size above 64 bits", SIZE,
           fields_with(lambda fields: fields["files"][-1].update(size=2**70)), sealed=True),
    Attack("negative-size", "a size below zero", ".size: ",
           fields_with(lambda fields: fields["files"][-1].update(size=-1)), sealed=True),
    Attack("other-shape", "a noise of another shape", "the manifest says",
           fields_with(lambda fields: fields["inputs"][_noise(fields)]["shape"].append(2)), sealed=True),
    Attack("pickled-golden", "a golden file that is no safetensors file", GOLDEN, golden_bytes(lambda _: b"\x80\x04N."),
           sealed=True),
    Attack("long-header", "a golden file whose header is longer than the file", GOLDEN,
           golden_bytes(lambda data: struct.pack("<Q", 2**63) + data[8:]), sealed=True),
    Attack("far-offsets", "a golden tensor behind the end of the file", GOLDEN,
           header_with(lambda header: header["sample"].update(data_offsets=[2**40, 2**40 + 16])), sealed=True),
    Attack("trailing-golden", "bytes behind the last golden tensor", GOLDEN,
           golden_bytes(lambda data: data + bytes(4)), sealed=True),
    Attack("overlapping-golden", "two golden tensors on the same bytes, and bytes of none", GOLDEN,
           header_with(lambda header: header["state.1"].update(data_offsets=header["sample"]["data_offsets"])),
           sealed=True),
    Attack("short-tensor", "a golden tensor with fewer bytes than its shape needs", GOLDEN,
           header_with(lambda header: header["sample"]["shape"].append(2)), sealed=True),
    Attack("no-sample", "a golden file without the sample", "golden.safetensors holds",
           golden_with(lambda arrays: arrays.pop("sample")), sealed=True),
    Attack("nan-golden", "a golden sample that is not a number", "NaN or infinite", golden_with(to_nan), sealed=True),
    Attack("extra-file", "a file that the manifest does not know", "is not in its manifest",
           lambda f: (f / "extra.so").write_bytes(b""), needs_listing=True),
    Attack("linked-artefact", "an artefact that is a link to a file elsewhere", "is a symbolic link", link,
           needs_listing=True),
)  # fmt: skip


def _noise(fields: Fields) -> int:
    return next(i for i, spec in enumerate(fields["inputs"]) if spec["name"] == "noise")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    sys.stdout.write(f"{target}: {len(write_attacks(source, target))} damaged bundles\n")
