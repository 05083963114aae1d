"""The two sides of the speed of tuning take the same step: where the model is far off, their losses are near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import finetune_speed
from benchmarks.finetune_speed import SIDES, kept, make_task, ours
from mmd_export.errors import NotAvailableError


def test_both_sides_have_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights; on other noise, and where the plain side takes a batch of real images, ours takes all."""
    monkeypatch.setattr(finetune_speed, "REAL_IMAGES", 512)
    torch.manual_seed(0)
    losses = {side: make(make_task("small", tmp_path, "cpu", batch_size=64))() for side, make in SIDES.items()}
    assert losses["ours"] > 0.0
    assert losses["plain"] == pytest.approx(losses["ours"], rel=0.3)


def test_what_does_not_compile_is_measured_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(task: object) -> None:
        tried.append(task)
        raise NotAvailableError("another gradient")

    monkeypatch.setattr(finetune_speed, "make_task", lambda *_, **values: values)
    monkeypatch.setattr(finetune_speed, "our_step", refuse)
    for _ in range(2):
        assert ours("small", tmp_path, "cuda") == {"autocast": "bf16", "channels_last": True, "compile": False}
    assert len(tried) == 1
    assert kept(tmp_path)["refused"] == {"small": "another gradient"}
    assert ours("small", tmp_path, "cpu") == finetune_speed.OURS["cpu"]
