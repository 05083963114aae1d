"""The golden arrays are computed in parts, so that memory has a bound: the parts are those of one pass."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mmd_export import heap, reference
from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError
from mmd_export.reference import golden_arrays
from tests.models import save_model

COUNT, VALUES = 3, 64  # images, and what one of them has


@pytest.mark.parametrize(("at_once", "parts"), [(VALUES, [1, 1, 1]), (2 * VALUES, [2, 1]), (1, [1, 1, 1])])
def test_parts_give_what_one_pass_gives(
    at_once: int, parts: list[int], tiny_labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(str(tiny_labels))
    plan = checkpoint.plan_for(2, sampler="ddim", eta=1.0)
    sizes: list[int] = []
    real = reference.run_chain

    def run_chain(sampler: Any, inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
        sizes.append(len(inputs["noise"]))
        return real(sampler, inputs, dtype)

    monkeypatch.setattr(reference, "run_chain", run_chain)
    whole = golden_arrays(checkpoint, plan, COUNT)
    monkeypatch.setattr(reference, "VALUES_AT_ONCE", at_once)
    divided = golden_arrays(checkpoint, plan, COUNT)
    assert sizes == [COUNT, *parts]
    assert list(divided) == list(whole) == ["noise", "step_noise", "class_labels", "state.1", "state.2", "sample"]
    assert len(set(whole["class_labels"].tolist())) > 1  # a label that went to another image would show
    for name, array in whole.items():
        np.testing.assert_allclose(divided[name], array, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("value", [math.nan, 1e38])
def test_a_model_that_breaks_down_is_refused_by_its_first_bad_state(value: float, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(save_model(tmp_path, {"clip_sample": False, "prediction_type": "epsilon"})))
    for parameter in cast(Any, checkpoint.denoiser).unet.conv_out.parameters():
        parameter.fill_(value)
    plan = checkpoint.plan_for(3)
    with pytest.raises(
        UsageError, match=r"its float64 reference gives NaN, .* in state\.1, of 3 steps; check its weights"
    ):
        golden_arrays(checkpoint, plan, 1)


def test_garbage_is_gone_before_memory_is_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        other: Node

    node, trims = Node(), list[bool]()
    node.other, gone = node, weakref.ref(node)
    del node

    def malloc_trim(_: int) -> None:
        trims.append(gone() is None)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(malloc_trim=malloc_trim))
    gc.disable()
    try:
        heap.release_heap(heap.WORTH - 1)
        assert trims == []
        heap.release_heap(heap.WORTH)
    finally:
        gc.enable()
    assert trims == [True]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_other_c_libraries_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: None) -> SimpleNamespace:
        assert platform == "linux", "only glibc is asked"
        return SimpleNamespace()  # musl has no malloc_trim

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("ctypes.CDLL", library)
    heap.release_heap(heap.WORTH)
