"""Networks of users as they are written: what can be shipped is, what cannot is told in one line with the next move."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import UsageError

HABITS = "python:tests.foreign_habits"


def options(attribute: str, out: Path, batch: str = "1..2") -> BuildOptions:
    return BuildOptions(f"{HABITS}:{attribute}", "onnx", out, steps=2, batch=batch)


@pytest.mark.parametrize("attribute", ["KeepsTable", "KeepsByFunction", "KeepsFeatures", "OfWholeTimesteps"])
def test_what_a_network_keeps_does_not_matter(attribute: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.export warns of attributes that were set
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        bundle = build(options(attribute, tmp_path / "b"))
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5


REFUSED = {
    "Clamping": r"writes into its input x; begin with a copy, x = x.clone\(\)$",
    "Scaling": r"writes into its input x; begin with a copy",
    "Compiled": r"is compiled by torch.compile \(part\); give the module without it$",
    "Scripted": r"holds a TorchScript module \(part\), which cannot be captured; give its Python class$",
}


@pytest.mark.parametrize("attribute", REFUSED)
def test_what_cannot_be_captured_is_refused_at_once(attribute: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[attribute]) as error:
        load_checkpoint(f"{HABITS}:{attribute}")
    assert str(error.value).startswith(f"model {HABITS}:{attribute} ")


def test_autocast_is_not_called_control_flow(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"switches autocast; leave torch.autocast out, --precision sets the graph's$"):
        build(options("Autocast", tmp_path / "b"))


def test_the_length_of_a_free_batch(tmp_path: Path) -> None:
    words = (
        r"one batch size only: .* Often len\(x\) or int\(x.shape\[0\]\) does that, and .* does not; .* --batch 1, or"
    )
    with pytest.raises(UsageError, match=words) as error:
        build(options("OfHalfItsLength", tmp_path / "b"))
    assert "TORCH_LOGS" not in str(error.value)
    build(options("OfHalfItsLength", tmp_path / "b", batch="2"))


def test_a_fraction_for_a_network_of_whole_timesteps(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^model OfWholeTimesteps fails at timestep 499.5 of the plan: .*; choose whole ones"
    ):
        build(BuildOptions(f"{HABITS}:OfWholeTimesteps", "onnx", tmp_path / "b", steps=3, sampler="euler"))
