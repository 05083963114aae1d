"""Bundles: what is written is read back, and only whole and right manifests are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from mmd_export.bundle import (
    BatchSpec,
    Bundle,
    CheckpointRef,
    GraphInfo,
    ManifestDraft,
    Measured,
    TensorSpec,
    update_card,
    write_bundle,
)
from mmd_export.errors import BundleError, ParityError, UsageError
from mmd_export.manifest import DecoderInfo, canonical_json, schema_text
from tests.export.bundles import CARD, ROOT, SHAPE, artefact, contents, draft, golden, left_beside, make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "digits-2"


def test_a_bundle_holds_what_was_put_in(out: Path) -> None:
    written = make(out)
    bundle = Bundle.open(out)
    assert bundle == written
    assert bundle.folder == out
    assert [entry.path for entry in bundle.manifest.files] == [
        "README.md",
        "golden.safetensors",
        "model.onnx",
        "model.onnx_data",
    ]
    assert bundle.artefact_path == out / "model.onnx"
    assert bundle.card == CARD
    assert bundle.manifest.plan == draft().plan
    tensors = bundle.golden()
    assert (tensors.count, tensors.steps, tensors.step_noise, tensors.class_labels) == (3, 2, None, None)
    assert np.array_equal(tensors.noise, golden()["noise"])
    assert np.array_equal(tensors.states[1], golden()["state.2"])
    assert tensors is bundle.golden()
    assert left_beside(out) == []


def test_the_same_inputs_give_the_same_bytes(out: Path, tmp_path: Path) -> None:
    make(out)
    make(tmp_path / "elsewhere" / "other name")
    assert contents(out) == contents(tmp_path / "elsewhere" / "other name")
    assert all(str(tmp_path).encode() not in data for data in contents(out).values())


def test_a_float_array_that_is_not_contiguous_is_stored_right(out: Path) -> None:
    swapped = {name: np.asfortranarray(array) for name, array in golden().items()}
    bundle = write_bundle(out, draft(), artefact, swapped, CARD)
    assert np.array_equal(Bundle.open(bundle.folder).golden().noise, golden()["noise"])


def test_step_noise_labels_and_uint8_output(out: Path) -> None:
    specs = (
        TensorSpec(name="noise", dtype="float32", shape=("batch", 1, 2, 2)),
        TensorSpec(name="step_noise", dtype="float32", shape=(1, "batch", 1, 2, 2)),
        TensorSpec(name="class_labels", dtype="int64", shape=("batch",)),
    )
    sample = TensorSpec(name="sample", dtype="uint8", shape=("batch", 2, 2, 1))
    arrays = golden() | {"step_noise": np.ones((1, 3, 1, 2, 2), np.float32), "class_labels": np.arange(3)}
    arrays["sample"] = np.zeros((3, 2, 2, 1), np.uint8)
    changed = draft(inputs=specs, outputs=(sample,), batch=BatchSpec(range=(1, 8)))
    tensors = write_bundle(out, changed, artefact, arrays, CARD).golden()
    assert tensors.step_noise is not None
    assert tensors.step_noise.shape == (1, 3, 1, 2, 2)
    assert tensors.class_labels is not None
    assert tensors.class_labels.tolist() == [0, 1, 2]


def test_the_range_of_labels_is_in_the_manifest_where_it_is_known(out: Path, tmp_path: Path) -> None:
    """A manifest that does not tell it says nothing of it, as those of before did."""
    arrays = golden() | {"class_labels": np.arange(3)}
    for folder, known in ((out, {"below": 5}), (tmp_path / "older", {})):
        labels = TensorSpec(name="class_labels", dtype="int64", shape=(1,), **known)
        write_bundle(folder, draft(inputs=(*draft().inputs, labels)), artefact, arrays, CARD)
        noise, written = json.loads((folder / "manifest.json").read_bytes())["inputs"]
        assert written == {"name": "class_labels", "dtype": "int64", "shape": [1], **known}
        assert sorted(noise) == ["dtype", "name", "shape"]
        assert Bundle.open(folder).manifest.spec("class_labels").below == known.get("below")
    with pytest.raises(ValueError, match="below"):
        TensorSpec(name="class_labels", dtype="int64", shape=(1,), below=0)
    with pytest.raises(ValueError, match="only int64 has a range"):
        TensorSpec(name="noise", dtype="float32", shape=(1,), below=3)


def test_the_card_is_replaced_and_sealed_again(out: Path) -> None:
    before = make(out)
    after = update_card(before, "# new\n", parity={"sample": 3e-6})
    assert Bundle.open(out) == after
    assert after.card == "# new\n"
    assert after.manifest.parity == {"sample": 3e-6}
    assert {**contents(out), "README.md": b"", "manifest.json": b""}.keys() == contents(out).keys()
    assert left_beside(out) == []


def test_a_card_update_does_not_bless_a_damaged_bundle(out: Path) -> None:
    bundle = make(out)
    (out / "model.onnx").write_bytes(bytes(512))
    with pytest.raises(BundleError, match="SHA-256"):
        update_card(bundle, "# new\n")
    assert (out / "README.md").read_text() == CARD


def test_what_only_the_compiler_knows_goes_into_the_manifest(out: Path) -> None:
    def compiled(folder: Path) -> ManifestDraft:
        artefact(folder)
        return draft(graph=GraphInfo(nodes=7, unique_weight_bytes=1, op_counts={"Add": 7}))

    write_bundle(out, draft(), compiled, golden(), CARD)
    assert Bundle.open(out).manifest.graph.nodes == 7


def test_a_measurement_goes_into_card_and_manifest_before_the_bundle_appears(out: Path) -> None:
    def measure(bundle: Bundle) -> Measured:
        assert not out.exists()
        assert bundle.artefact_path.is_file()
        return Measured(card=f"{bundle.name}: {bundle.golden().count} noises\n", parity={"sample": 0.5})

    bundle = make(out, measure=measure)
    assert Bundle.open(out).card == "digits-2: 3 noises\n"
    assert bundle.manifest.parity == {"sample": 0.5}


def test_a_failing_measurement_leaves_nothing(out: Path) -> None:
    def measure(bundle: Bundle) -> Measured:
        raise ParityError(f"{bundle.name} is wrong")

    with pytest.raises(ParityError):
        make(out, measure=measure)
    assert not out.exists()
    assert left_beside(out) == []


def test_the_published_schema_is_current_and_fits_a_real_manifest(out: Path) -> None:
    published = (ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), "run python -m mmd_export.manifest > docs/manifest.schema.json"
    make(out)
    manifest = json.loads((out / "manifest.json").read_bytes())
    validator = jsonschema.Draft202012Validator(json.loads(published))
    validator.validate(manifest)
    for broken in ({**manifest, "surprise": 1}, {**manifest, "schema_version": 2}, {**manifest, "files": None}):
        assert not validator.is_valid(broken)


def test_the_manifest_is_plain_text_in_canonical_form(out: Path) -> None:
    make(out)
    data = (out / "manifest.json").read_bytes()
    assert data == canonical_json(json.loads(data))
    assert data.endswith(b"}\n")
    assert data.isascii()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"name": "a\nb"},
        {"name": ""},
        {"artefact": "../model.onnx"},
        {"plan": {"steps": {1, 2}}},
        {"plan": {"weight": float("nan")}},
        {"parity": {"sample": float("inf")}},
        {"checkpoint": CheckpointRef.model_construct(name="/home/me/run", sha256="0" * 64, licence=None)},
        {"toolchain": {"torch": "built in /opt/torch/bin"}},
        {"hardware": {"sdk": "C:\\Users\\me"}},
        {"inputs": (TensorSpec(name="noise", dtype="float32", shape=(2, 1, 2, 2)),)},
        {"inputs": (TensorSpec(name="latent", dtype="float32", shape=SHAPE),)},
    ],
)
def test_a_wrong_draft_is_refused(changes: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        draft(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, "mean has 1 channels, std 0; each channel has both"),
        ({"std": (0.5,)}, "mean has 0 channels, std 1"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 4}, "mean has 3 channels, std 4"),
        ({"mean": (0.0, 0.0), "std": (1.0, 0.0)}, r"scale is 1 and std \[1.0, 0.0\]; a latent times 0 is none"),
        ({"scale": 0.0}, r"scale is 0 and std \[\]"),
    ],
)
def test_a_decoder_that_cannot_be_computed(changes: dict[str, Any], message: str) -> None:
    """Nothing of it may get lost on the way to the file: mean without std did."""
    whole: dict[str, Any] = {"autoencoder": "AutoencoderKL", "scale": 1.0, "shift": 0.0, "precision": "fp32"}
    assert DecoderInfo(**whole, mean=(0.0,), std=(2.0,)).model_dump()["mean"] == (0.0,)
    with pytest.raises(ValueError, match=message):
        DecoderInfo(**{**whole, **changes})


def test_batch_check_names_both_values_and_the_next_move() -> None:
    fixed, listed, ranged = BatchSpec(sizes=(1,)), BatchSpec(sizes=(1, 4, 8)), BatchSpec(range=(1, 8))
    for spec, size in ((fixed, 1), (listed, 4), (ranged, 5)):
        spec.check(size)
    with pytest.raises(UsageError) as error:
        fixed.check(2, bundle="digits-5")
    assert str(error.value) == "input 'noise' has batch 2, bundle digits-5 was built for 1; build with --batch 2"
    with pytest.raises(UsageError, match="has batch 2, bundle d was built for 1,4,8; build with --batch 1,2,4,8"):
        listed.check(2, bundle="d")
    with pytest.raises(UsageError, match=r"has batch 9, bundle d was built for 1..8; build with --batch 1..9"):
        ranged.check(9, bundle="d")
    with pytest.raises(UsageError, match=r"has batch 0, .* build with --batch 1"):
        fixed.check(0, bundle="d")


def test_batch_chunks() -> None:
    assert [BatchSpec(sizes=(1, 4, 8)).next_chunk(n) for n in (1, 3, 4, 7, 8, 100)] == [1, 1, 4, 4, 8, 8]
    assert [BatchSpec(sizes=(4,)).next_chunk(n) for n in (1, 4, 5)] == [4, 4, 4]
    assert [BatchSpec(range=(2, 8)).next_chunk(n) for n in (1, 2, 5, 9)] == [2, 2, 5, 8]


@pytest.mark.parametrize("text", ["1", "1,4,8", "1..8"])
def test_batch_option_is_read_back(text: str) -> None:
    assert str(BatchSpec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1,", "8..1", "1..2..3", "0..4", "1.5"])
def test_a_bad_batch_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give a size"):
        BatchSpec.parse(text)
