"""Engines packed with xz."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from mmd_export.trt.packing import pack, read_engine


def test_a_packed_engine_is_read_as_it_was(tmp_path: Path) -> None:
    engine = b"code" * 10**6 + bytes(range(256))
    found = []
    for name in ("1", "2"):
        (tmp_path / "model.plan").write_bytes(engine)
        pack(tmp_path / "model.plan", tmp_path / f"{name}.plan.xz")
        assert not (tmp_path / "model.plan").exists()
        found.append((tmp_path / f"{name}.plan.xz").read_bytes())
        assert read_engine(tmp_path / f"{name}.plan.xz") == engine
    assert found[0] == found[1]
    assert len(found[0]) < len(engine) / 100
    assert lzma.decompress(found[0]) == engine  # what xz -d reads, too
    (tmp_path / "model.plan").write_bytes(engine)
    assert read_engine(tmp_path / "model.plan") == engine


def test_half_a_packed_engine_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"code" * 10**6)
    pack(tmp_path / "model.plan", tmp_path / "model.plan.xz")
    (tmp_path / "model.plan.xz").write_bytes((tmp_path / "model.plan.xz").read_bytes()[:-40])
    with pytest.raises((EOFError, lzma.LZMAError)):
        read_engine(tmp_path / "model.plan.xz")
