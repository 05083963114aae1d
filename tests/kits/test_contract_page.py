"""``runtimes/README.md``, which every kit follows: its vectors, its words, its fields."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from mmd_export.manifest import Manifest, canonical_json
from mmd_export.noise import normal
from tests.attacks import ATTACKS, artefact_of, write_attacks
from tests.export.bundles import make
from tests.project.checks import ROOT

PAGE = (ROOT / "runtimes/README.md").read_text(encoding="utf-8")
VECTOR = re.compile(r"\| `(\d+)` \| (\d+) \| (\d+) \| (\d+) \| `([0-9a-f]{64})` \|")


@pytest.mark.parametrize("vector", VECTOR.findall(PAGE))
def test_the_hashes_of_noise_are_those_of_the_package(vector: tuple[str, ...]) -> None:
    seed, stream, image, count = map(int, vector[:4])
    values = normal(seed, (1, 1, count), range(image, image + 1), stream)
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == vector[4]


def test_there_are_vectors() -> None:
    assert len(VECTOR.findall(PAGE)) == 3


def test_the_seal_is_read_as_the_page_says(tmp_path: Path) -> None:
    """Without the one line, nothing written again."""
    text = (make(tmp_path / "digits-2").folder / "manifest.json").read_bytes()
    (line,) = [line for line in text.splitlines(keepends=True) if line.startswith(b' "manifest_sha256": ')]
    fields = json.loads(text)
    assert hashlib.sha256(text.replace(line, b"")).hexdigest() == fields["manifest_sha256"]
    del fields["manifest_sha256"]
    assert text.replace(line, b"") == canonical_json(fields)


def test_the_fields_of_the_page_are_in_the_manifest() -> None:
    table = PAGE.split("## The manifest")[1].split("## ")[0]
    for names in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`([a-z_0-9]+)", names):
            assert name in Manifest.model_fields, name


def test_every_attack_is_in_the_index(tmp_path: Path) -> None:
    """That the package refuses each of them is in test_python_kit."""
    write_attacks(make(tmp_path / "digits-2").folder, tmp_path / "attacks")
    index = json.loads((tmp_path / "attacks/index.json").read_text())["attacks"]
    assert [entry["id"] for entry in index] == [attack.id for attack in ATTACKS]
    assert all((tmp_path / "attacks" / entry["id"]).is_dir() and entry["says"] for entry in index)


def test_the_artefact_is_found_in_a_folder_too(tmp_path: Path) -> None:
    assert artefact_of(make(tmp_path / "digits-2").folder).name == "model.onnx"
