"""Every byte of a bundle counts: what was changed, cut, added or smuggled in is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mmd_export.bundle import (
    BatchSpec,
    Bundle,
    write_bundle,
)
from mmd_export.errors import BundleError, UsageError
from mmd_export.manifest import canonical_json
from tests.export.bundles import CARD, artefact, draft, golden, make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "digits-2"


def test_every_byte_of_the_manifest_counts(out: Path) -> None:
    make(out)
    path = out / "manifest.json"
    original = path.read_bytes()
    for position in range(len(original)):
        flipped = original[position] ^ (1 << position % 8)
        path.write_bytes(original[:position] + bytes([flipped]) + original[position + 1 :])
        with pytest.raises(BundleError):
            Bundle.open(out)
    path.write_bytes(original)
    Bundle.open(out)


@pytest.mark.parametrize("name", ["README.md", "golden.safetensors", "model.onnx", "model.onnx_data"])
def test_a_changed_byte_of_any_other_file_is_found(out: Path, name: str) -> None:
    make(out)
    original = (out / name).read_bytes()
    for position in sorted({0, 1, 7, 8, len(original) // 2, len(original) - 1} & set(range(len(original)))):
        (out / name).write_bytes(original[:position] + bytes([original[position] ^ 0x10]) + original[position + 1 :])
        with pytest.raises(BundleError, match=f"'{name}' has SHA-256 .*the manifest says .*; rebuild"):
            Bundle.open(out)


@pytest.mark.parametrize("name", ["README.md", "golden.safetensors", "model.onnx", "model.onnx_data"])
def test_a_truncated_or_missing_file_is_found(out: Path, name: str) -> None:
    make(out)
    size = (out / name).stat().st_size
    os.truncate(out / name, size - 1)
    with pytest.raises(BundleError, match=f"'{name}' has {size - 1} bytes, the manifest says {size}"):
        Bundle.open(out)
    (out / name).unlink()
    with pytest.raises(BundleError, match=f"'{name}' is missing"):
        Bundle.open(out)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_truncated_manifest_is_found(out: Path, size: int) -> None:
    make(out)
    os.truncate(out / "manifest.json", size)
    with pytest.raises(BundleError, match="not readable JSON"):
        Bundle.open(out)


def test_a_file_that_is_not_listed_is_found(out: Path) -> None:
    make(out)
    (out / "deep").mkdir()
    (out / "deep" / "extra.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'deep/extra.bin' is not in its manifest; delete"):
        Bundle.open(out)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "another"])
def test_a_symbolic_link_is_refused(out: Path, tmp_path: Path, name: str) -> None:
    make(out)
    moved = tmp_path / "moved"
    moved.write_bytes((out / name).read_bytes() if (out / name).exists() else b"")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(moved)
    with pytest.raises(BundleError, match=r"symbolic link|no plain file"):
        Bundle.open(out)


def test_a_pipe_is_refused_without_waiting_for_it(out: Path) -> None:
    make(out)
    (out / "model.onnx").unlink()
    os.mkfifo(out / "model.onnx")
    with pytest.raises(BundleError, match=r"'model.onnx' is no plain file"):
        Bundle.open(out)


def reseal(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as an attacker would: with a right hash, in canonical form."""
    fields = json.loads((out / "manifest.json").read_bytes())
    del fields["manifest_sha256"]
    change(fields)
    digest = hashlib.sha256(canonical_json(fields)).hexdigest()
    (out / "manifest.json").write_bytes(canonical_json(fields | {"manifest_sha256": digest}))


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../outside", "a\\b", "a\0b", "C:/x", "./README.md", "", "a//b"]
)
def test_a_path_that_climbs_out_is_refused(out: Path, path: str) -> None:
    make(out)
    reseal(out, lambda fields: fields["files"].insert(0, {"path": path, "size": 0, "sha256": "0" * 64}))
    with pytest.raises(BundleError, match="not a plain relative path"):
        Bundle.open(out)


def test_another_schema_version_is_named(out: Path) -> None:
    make(out)
    reseal(out, lambda fields: fields.update(schema_version=2))
    with pytest.raises(BundleError, match=r"manifest.json has schema version 2, this mmd-export reads 1"):
        Bundle.open(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda f: f["batch"].update(surprise=1), "batch.surprise"),
        (lambda f: f.pop("target"), "target: Field required"),
        (lambda f: f["tolerance"].update(atol=1), "was changed"),
        (lambda f: f["graph"].update(nodes="12"), "was changed"),
        (lambda f: f["files"].reverse(), "not sorted"),
        (lambda f: f["files"].pop(), "'model.onnx_data' is not in its manifest"),
        (lambda f: f.update(artefact="golden.safetensors"), "taken by another file"),
        (lambda f: f.update(artefact="other.onnx"), "do not list 'other.onnx'"),
        (lambda f: f["plan"]["steps"].pop(), "holds 2 states, the plan has 1 steps"),
        (lambda f: f["inputs"][0].update(shape=[1, 1, 2, 3]), r"'noise' is float32 \(3, 1, 2, 2\), the manifest says"),
        (lambda f: f["inputs"][0].update(dtype="int64"), "'noise' is float32"),
        (lambda f: f["outputs"].append({"name": "more", "dtype": "float32", "shape": [1]}), "golden.safetensors holds"),
        (lambda f: f["batch"].update(sizes=[2]), "'noise' has batch 1, the bundle's batch is 2"),
    ],
)
def test_a_manifest_with_a_right_hash_and_wrong_content_is_refused(
    out: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    make(out)
    reseal(out, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(out)


@pytest.mark.parametrize(
    "change", [lambda data: data + b" ", lambda data: data[:-1], lambda data: data.replace(b": ", b":  ")]
)
def test_the_same_content_in_another_form_is_refused(out: Path, change: Callable[[bytes], bytes]) -> None:
    make(out)
    (out / "manifest.json").write_bytes(change((out / "manifest.json").read_bytes()))
    with pytest.raises(BundleError, match=r"not in canonical form .*first difference at byte"):
        Bundle.open(out)


@pytest.mark.parametrize(("old", "new"), [("digits-2", "digits-3"), ("0.0001", "0.1"), ('"nodes": 12', '"nodes": 13')])
def test_a_changed_value_in_canonical_form_is_refused(out: Path, old: str, new: str) -> None:
    make(out)
    text = (out / "manifest.json").read_text()
    assert old in text
    (out / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(BundleError, match=r"manifest.json was changed: its hash is"):
        Bundle.open(out)


def test_a_key_that_stands_twice_is_refused(out: Path) -> None:
    make(out)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('{\n "artefact"', '{\n "target": "onnx",\n "artefact"', 1))
    with pytest.raises(BundleError, match="key 'target' stands twice"):
        Bundle.open(out)


@pytest.mark.parametrize(
    "text", ["[]", "null", "1", '{"schema_version": NaN}', "[" * 100_000, '{"a": "\ud800"}', "\x00", '"\xff"']
)
def test_json_that_is_no_manifest_is_refused(out: Path, text: str) -> None:
    make(out)
    (out / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleError, match="digits-2"):
        Bundle.open(out)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_golden_tensors_must_be_finite(out: Path, bad: float) -> None:
    arrays = golden()
    arrays["state.2"][1, 0, 1, 1] = bad
    with pytest.raises(BundleError, match=r"'state.2' holds 1 NaN or infinite values"):
        write_bundle(out, draft(), artefact, arrays, CARD)
    assert not out.exists()


@pytest.mark.parametrize("name", ["noise", "state.1", "state.2", "sample"])
def test_golden_tensors_must_be_complete(out: Path, name: str) -> None:
    arrays = golden()
    del arrays[name]
    with pytest.raises(BundleError, match=r"golden.safetensors holds"):
        write_bundle(out, draft(), artefact, arrays, CARD)


def test_golden_count_must_fit_the_batch(out: Path) -> None:
    specs = {"inputs": draft().inputs, "outputs": draft().outputs}
    two = {kind: (spec[0].model_copy(update={"shape": (2, 1, 2, 2)}),) for kind, spec in specs.items()}
    with pytest.raises(BundleError, match="holds 3 images, which batch 2 cannot run unpadded"):
        write_bundle(out, draft(batch=BatchSpec(sizes=(2,)), **two), artefact, golden(3), CARD)
    write_bundle(out, draft(batch=BatchSpec(sizes=(2,)), **two), artefact, golden(4), CARD)


def test_golden_that_is_no_safetensors_file_is_refused(out: Path) -> None:
    make(out)
    data = b"\x80\x04pickle"
    (out / "golden.safetensors").write_bytes(data)
    entry = {"path": "golden.safetensors", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(out, lambda fields: fields["files"].__setitem__(1, entry))
    with pytest.raises(BundleError, match=r"golden.safetensors cannot be read"):
        Bundle.open(out)


def test_a_folder_that_is_no_bundle_is_a_wrong_argument(tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="is not a bundle"):
            Bundle.open(place)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a bundle"):
        Bundle.open(tmp_path / "file")


def test_a_golden_file_with_another_dtype_is_refused(out: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {name: array.astype(np.float64) for name, array in golden().items()}
    with pytest.raises(BundleError, match=r"'noise' is float64 .*, the manifest says float32"):
        write_bundle(out, draft(), artefact, arrays, CARD)
    assert safetensors.numpy.save(golden()) == safetensors.numpy.save(golden())
