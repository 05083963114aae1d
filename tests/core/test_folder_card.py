"""What a folder states about itself reaches the checkpoint and the card of a bundle; what is no name does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmd_export.build import reference_to
from mmd_export.card import model_card, with_lineage, with_lineage_of
from mmd_export.checkpoint import load_checkpoint
from mmd_export.checkpoints.folder_card import stated_licence, stated_lineage
from tests.export.bundles import draft

BASE, DATA = "1" * 64, "2" * 64
RECORD = {"settings": {"model": "digits", "data": "d.npz"}, "base_sha256": BASE, "data_sha256": DATA}
LINEAGE = {"base model": f"`digits`, SHA-256 `{BASE[:16]}`", "data": f"`d.npz`, SHA-256 `{DATA[:16]}`"}


def card(folder: Path, *lines: str) -> Path:
    (folder / "README.md").write_text("\n".join(("---", *lines, "---", "# A model", "license: of-the-text")))
    return folder


def test_a_folder_hands_its_licence_and_lineage_on(tiny: Path, tmp_path: Path) -> None:
    folder = card(Path(shutil.copytree(tiny, tmp_path / "model")), "license: apache-2.0")
    (folder / "settings.json").write_text(json.dumps(RECORD))
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.licence, checkpoint.lineage) == ("apache-2.0", LINEAGE)
    assert checkpoint.sha256 == load_checkpoint(tiny).sha256
    shown = with_lineage(model_card(draft(checkpoint=reference_to(checkpoint))), checkpoint.lineage)
    assert "| licence of the weights | apache-2.0 |" in shown
    assert shown.index("## Lineage\n\n- base model: `digits`, SHA") < shown.index("## Parity with")
    assert with_lineage_of(model_card(draft()), shown).count(LINEAGE["data"]) == 1


def test_a_card_without_lineage_has_no_such_section() -> None:
    plain = model_card(draft())
    assert with_lineage(plain, {}) == with_lineage_of(plain, plain) == plain


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        (["license: mit  # as the paper"], "mit"),
        (['license: "openrail++"'], "openrail++"),
        (["tags: [a]", "license: CC-BY-4.0"], "CC-BY-4.0"),
        (["license:", "- mit", "- apache-2.0"], None),
        (["license: [mit]"], None),
        (["license: /home/me/LICENSE"], None),
        (["model:", "  license: mit"], None),
        ([], None),
    ],
)
def test_only_a_plain_string_is_a_licence(lines: list[str], licence: str | None, tmp_path: Path) -> None:
    assert stated_licence(card(tmp_path, *lines)) == licence


def test_no_front_matter(tmp_path: Path) -> None:
    assert (stated_licence(tmp_path), stated_lineage(tmp_path)) == (None, {})
    for text in ("license: mit\n", "---\nlicense: mit\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert stated_licence(tmp_path) is None


def test_lineage_takes_names_alone(tmp_path: Path) -> None:
    assert stated_lineage(card(tmp_path, "base_model: owner/name")) == {"base model": "`owner/name`"}
    assert stated_lineage(card(tmp_path, "base_model: /home/me/model")) == {}
    changed = {**RECORD, "settings": {"model": "a\n## Parity", "data": "hf:owner/name?split=train"}, "data_sha256": 3}
    (tmp_path / "settings.json").write_text(json.dumps(changed))
    assert stated_lineage(tmp_path) == {"data": "`hf:owner/name?split=train`"}
    (tmp_path / "settings.json").write_text("[")
    assert stated_lineage(tmp_path) == {}
