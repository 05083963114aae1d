"""Every tolerance that cites a result file cites the number that stands there, and allows more than it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fault_injection import HONEST
from mmd_export.errors import NotAvailableError
from mmd_export.parity import Rung, compare
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.precision.formats import GRIDS
from mmd_export.reference import to_uint8
from mmd_export.targets import get_target, target_names
from mmd_export.tolerance import (
    BASES,
    BY_GAIN,
    ON_A_DEVICE,
    Measurement,
    artefact_tolerance,
    mean_tolerance,
    torch_tolerance,
    uint8_tolerance,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EVERY = {**BASES, ("torch", "by gain"): BY_GAIN, ("device", "fp16"): ON_A_DEVICE}
CITED = [(key, measurement) for key, basis in EVERY.items() for measurement in basis.measured]


def found(value: Any, path: tuple[str, ...]) -> Iterator[float]:
    """Every number under ``path``."""
    if not path:
        yield float(value)
        return
    head, *rest = path
    if head == "*":
        for inner in value.values() if isinstance(value, dict) else value:
            yield from found(inner, tuple(rest))
    elif "=" in head and isinstance(value, list):
        key, wanted = head.split("=")
        yield from found([row for row in value if row[key] == wanted], tuple(rest))
    elif isinstance(value, list):
        assert value
        for row in value:
            yield from found(row, path)
    else:
        yield from found(value[head], tuple(rest))


@pytest.mark.parametrize(("key", "measurement"), CITED, ids=lambda value: str(value)[:60])
def test_a_cited_number_is_the_one_in_the_file(key: tuple[str, str], measurement: Measurement) -> None:
    result = json.loads((RESULTS / measurement.file).read_text(encoding="utf-8"))
    largest = max(found(result, measurement.path))
    assert measurement.value == float(f"{largest:.2e}"), f"{key}: {measurement.file} says {largest}"
    assert largest < EVERY[key].atol


@pytest.mark.parametrize("key", BASES, ids=" ".join)
def test_no_tolerance_outgrows_what_was_measured(key: tuple[str, str]) -> None:
    """fp32 has one tolerance everywhere; one of a lower precision follows its own measurements."""
    basis = BASES[key]
    most = 60 if key[1] == "fp32" else 10
    assert basis.atol <= most * max(measurement.value for measurement in basis.measured)


def test_a_number_that_moved_is_noticed() -> None:
    rows = {"packages": [{"model": "digits", "worst": 0.2}, {"model": "other", "worst": 0.9}]}
    assert list(found(rows, ("packages", "model=digits", "worst"))) == [0.2]
    assert max(found(rows, ("packages", "worst"))) == 0.9


def test_every_precision_has_a_tolerance_with_its_reason() -> None:
    for name in target_names():
        for precision in get_target(name).precisions:
            tolerance = artefact_tolerance(name, precision)
            assert tolerance.atol > 0
            assert len(tolerance.reason) > 10
    with pytest.raises(NotAvailableError, match="no measured tolerance for onnx fp2; measured: onnx fp32"):
        artefact_tolerance("onnx", "fp2")
    cited = {target for (target, _), basis in BASES.items() if basis.measured}
    assert {"onnx", "openvino", "coreml"} <= cited


def test_a_plan_that_multiplies_outputs_multiplies_their_rounding() -> None:
    rows = json.loads((RESULTS / "steep_plans.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert row["error"] < artefact_tolerance("onnx", "fp32", row["gain"]).atol, row
    assert any(row["error"] > artefact_tolerance("onnx", "fp32").atol for row in rows)
    steep = torch_tolerance(157.4)
    assert steep.atol == 0.0039
    assert steep.reason.endswith("; here 157")
    assert torch_tolerance(3.9) == torch_tolerance()
    assert artefact_tolerance("onnx", "fp16", 157.4) == artefact_tolerance("onnx", "fp16")


def test_the_gain_of_a_plan_counts_direct_and_clean_terms_of_one_output_together() -> None:
    first = Step(9, 0.1, 0.9, (Term("state", 0, 0.5), Term("output", 0, -2.0), Term("clean", 0, 3.0)), (1.0, -4.0))
    second = Step(0, 0.9, 0.1, (Term("output", 0, 1.0), Term("output", 1, -2.5), Term("noise", 0, 50.0)))
    assert StepPlan("test", "epsilon", (first, second), clip=1.0).output_gain == 14.0
    assert (
        StepPlan("test", "epsilon", (replace(first, update=(Term("state", 0, 1.0),)), second), 1.0).output_gain == 3.5
    )


def test_the_mean_of_honest_artefacts_is_within_its_tolerance() -> None:
    result = json.loads((RESULTS / "honest_tails.json").read_text(encoding="utf-8"))
    means = result["worst_mean_honest"]
    assert set(means) == {f"{target} {precision}" for target, precision, *_ in HONEST}
    for name, mean in means.items():
        target, precision = name.split()
        assert 2 * mean < mean_tolerance(BASES[target, precision].atol), name


def test_levels_of_bytes_follow_the_tolerance() -> None:
    for atol, levels, mean in ((1e-4, 1.0, 0.01275), (0.01, 2.0, 0.25), (0.03, 4.0, 0.478125), (1.6, 204.0, 25.5)):
        found = uint8_tolerance(atol)
        assert found[0] == levels
        assert found[1] == pytest.approx(mean)


@pytest.mark.parametrize("precision", GRIDS)
def test_another_picture_fails_as_bytes_where_it_fails_as_floats(precision: str) -> None:
    atol = BASES["onnx", precision].atol
    levels, mean = uint8_tolerance(atol)

    def verdicts(other: np.ndarray[Any, Any]) -> tuple[str, str]:
        floats = Rung(6, (compare("sample", other, waves),), atol, mean=mean_tolerance(atol))
        found = compare("sample", to_uint8(other), to_uint8(waves))
        return floats.verdict, Rung(6, (found,), atol, sample_atol=levels, sample_mean=mean).verdict

    waves = (0.6 * np.sin(np.arange(3 * 2 * 16 * 16).reshape(3, 2, 16, 16) / 9)).astype(np.float32)
    noise = np.random.default_rng(0).uniform(-1, 1, waves.shape).astype(np.float32)
    assert verdicts(np.clip(waves + np.float32(0.55), -1, 1)) == ("failed", "failed")
    assert verdicts(waves + np.float32(1.9 * mean_tolerance(atol)) * noise) == ("passed", "passed")


def test_a_truncation_fails_where_half_a_level_is_allowed_to_a_value() -> None:
    waves = 0.6 * np.sin(np.arange(3 * 2 * 16 * 16).reshape(3, 2, 16, 16) / 9)
    rounded, atol = to_uint8(waves), BASES["onnx", "fp16"].atol
    truncated = np.ascontiguousarray(((waves * 0.5 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    levels, mean = uint8_tolerance(atol)
    assert Rung(6, (compare("sample", truncated, rounded),), atol, sample_atol=levels).passed
    assert not Rung(6, (compare("sample", truncated, rounded),), atol, sample_atol=levels, sample_mean=mean).passed


def test_the_page_says_what_a_device_may_reach() -> None:
    rows = json.loads((RESULTS / "half_ends.json").read_text(encoding="utf-8"))["rows"]
    kind = {"model": "digits", "precision": "fp16", "run": "every result rounded", "trial": "both ends, as shipped"}
    (row,) = (each for each in rows if kind.items() <= each.items())
    page = " ".join((ROOT / "docs" / "precision.md").read_text(encoding="utf-8").split())
    assert f"may reach {row['worst']:.1e} on digits, for {row['beyond_aim']} of {row['images']} images" in page
    assert f"--atol {ON_A_DEVICE.atol:g}` allows it" in page
