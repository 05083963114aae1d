"""A comparison is worth what it can refuse: every kind of difference fails, and the failure names its place."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mmd_export.errors import ParityError
from mmd_export.parity import Comparison, Coverage, Culprit, Limits, ParityReport, Rung, compare

ATOL = 1e-4
Array = np.ndarray[Any, Any]


def images(dtype: Any = np.float32) -> Array:
    return np.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4).astype(dtype)


def changed(index: tuple[int, ...], value: float) -> Array:
    result = images()
    result[index] = value
    return result


def test_equal_arrays_pass() -> None:
    found = compare("sample", images(), images())
    assert (found.max_abs, found.mean_abs, found.faults) == (0.0, 0.0, ())
    assert found.passes(0.0)


def test_one_pixel_off_by_twice_the_tolerance() -> None:
    index = (2, 1, 3, 0)
    for sign in (-1, 1):
        found = compare("sample", changed(index, images()[index] + sign * 2 * ATOL), images())
        assert not found.passes(ATOL)
        assert found.worst_index == index
        assert found.max_abs == pytest.approx(2 * ATOL, rel=1e-3)
        assert found.mean_abs == pytest.approx(2 * ATOL / images().size, rel=1e-3)
    assert compare("sample", changed(index, images()[index] + 0.5 * ATOL), images()).passes(ATOL)


@pytest.mark.parametrize(
    ("value", "fault"), [(np.nan, "1 NaN values"), (np.inf, "1 infinite values"), (-np.inf, "1 infinite values")]
)
def test_a_value_that_is_no_number(value: float, fault: str) -> None:
    index = (0, 1, 2, 3)
    found = compare("sample", changed(index, value), images())
    assert found.faults == (fault,)
    assert found.worst_index == index
    assert not found.passes(np.inf)
    reference = compare("sample", images(), changed(index, value))
    assert not reference.passes(1e30)
    both = compare("sample", changed(index, value), changed(index, value))
    assert not both.passes(np.inf)


def test_a_constant_image() -> None:
    """As a black image in fp16 would be, even if the reference were constant too."""
    flat = images()
    flat[1] = 0.25
    for expected in (images(), flat):
        found = compare("sample", flat, expected)
        assert found.faults == ("image 1 is constant",)
        assert not found.passes(np.inf)
    assert compare("gains", flat, flat, image=False).passes(0.0)
    assert compare("sample", flat.astype(np.uint8), flat.astype(np.uint8)).faults


@pytest.mark.parametrize("shape", [(3, 4, 4, 2), (1, 2, 4, 4), (3, 2, 4), (3, 2, 4, 4, 1), ()])
def test_a_wrong_shape(shape: tuple[int, ...]) -> None:
    found = compare("sample", np.zeros(shape, np.float32), images())
    assert found.faults == (f"shape {shape}, expected (3, 2, 4, 4)",)
    assert not found.passes(np.inf)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_a_wrong_dtype(dtype: Any) -> None:
    found = compare("sample", (images() * 100).astype(dtype), images())
    assert f"dtype {np.dtype(dtype)}, expected float32" in found.faults
    assert compare("state.1", images(np.float64), images()).faults == ()  # of a reference that is held in float64


def test_nothing_at_all() -> None:
    nothing = np.zeros((0, 1, 2, 2), np.float32)
    assert compare("sample", nothing, nothing).faults == ("no values",)


def test_transposed_channels() -> None:
    swapped = np.ascontiguousarray(images()[:, ::-1])
    assert compare("sample", swapped, images()).max_abs > 0.1


def test_uint8_differences_do_not_wrap() -> None:
    low, high = np.array([[0, 255]], np.uint8), np.array([[255, 0]], np.uint8)
    assert compare("sample", low, high).max_abs == 255


def test_a_comparison_is_plain_json() -> None:
    found = compare("sample", changed((0, 0, 0, 0), np.nan), images())
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "name": "sample",
        "max_abs": None,
        "mean_abs": None,
        "worst_index": [0, 0, 0, 0],
        "faults": ["1 NaN values"],
        "required_atol": None,
        "rtol": 0.0,
        "values": 96,
    }


# --- verdicts

GOOD = Comparison("state.1", 1e-6, 1e-7, (0, 0))
BAD = Comparison("state.2", 3e-4, 1e-5, (1, 0))


def rung(number: int, *comparisons: Comparison, **options: Any) -> Rung:
    return Rung(number, comparisons, options.pop("atol", ATOL), **options)


def report(*rungs: Rung) -> ParityReport:
    return ParityReport("digits-5", "onnxruntime", rungs)


def test_a_rung_passes_if_all_of_it_passes() -> None:
    assert rung(6, GOOD).verdict == "passed"
    assert rung(6, GOOD, BAD).verdict == "failed"
    assert rung(6, GOOD, BAD).failures == (BAD,)
    assert rung(6, GOOD, BAD).worst == 3e-4
    assert rung(6).verdict == "failed"
    assert rung(5, skipped="no checkpoint").verdict == "not checked"
    assert not rung(5, skipped="no checkpoint").passed


def test_the_tolerance_itself_passes_and_no_more() -> None:
    edge = Comparison("state.1", ATOL, 0.0)
    assert rung(6, edge).passed
    assert not rung(6, edge, atol=np.nextafter(ATOL, 0)).passed
    assert not rung(6, Comparison("state.1", float("nan"), 0.0)).passed


def test_levels_of_uint8_are_for_the_sample_alone() -> None:
    one = Comparison("sample", 1.0, 0.1)
    assert rung(6, one, sample_atol=1.0).passed
    assert not rung(6, one).passed
    assert not rung(6, Comparison("sample", 2.0, 0.1), sample_atol=1.0).passed
    assert not rung(6, Comparison("state.1", 1.0, 0.1), sample_atol=1.0).passed


def test_a_report_needs_the_artefact() -> None:
    skipped = tuple(rung(number, skipped="no checkpoint") for number in range(1, 6))
    assert report(*skipped, rung(6, GOOD)).passed
    for without in (
        report(),
        report(*skipped),
        report(rung(1, GOOD), rung(5, GOOD)),
        report(rung(6, skipped="no device")),
    ):
        assert not without.passed
        with pytest.raises(ParityError, match="bundle digits-5: the artefact was not compared with its golden file"):
            without.require()
    report(rung(1, GOOD), rung(6, GOOD)).require()


@pytest.mark.parametrize("number", range(1, 7))
def test_require_names_rung_and_step(number: int) -> None:
    failing = [rung(n, GOOD, BAD) if n >= number else rung(n, GOOD) for n in range(1, 7)]
    with pytest.raises(ParityError) as error:
        report(*failing).require()
    message = str(error.value)
    assert error.value.exit_code == 4
    assert message.startswith(f"bundle digits-5: rung {number} (")
    assert "state.2 is off by 0.0003 at (1, 0), the tolerance is 0.0001" in message
    assert "\n" not in message
    assert not report(*failing).passed


def test_require_names_a_fault() -> None:
    fault = Comparison("sample", 0.0, 0.0, None, ("image 0 is constant",))
    with pytest.raises(ParityError, match=r"rung 6 \(artefact in its runtime\) failed: sample: image 0 is constant"):
        report(rung(6, fault)).require()
    with pytest.raises(ParityError, match=r"rung 6 .* failed: nothing was compared"):
        report(rung(6)).require()


def test_require_blames_the_step_that_is_wrong_by_itself() -> None:
    """A wrong step spoils all states after it; only from the right state before it does it stand alone."""
    names = ("sample", "state.2", "state.3", "state.2 teacher-forced")
    failing = rung(6, *(Comparison(name, 1.0, 1.0, (0, 0)) for name in names))
    with pytest.raises(ParityError, match=r"sample is off by 1 at .*; the chain goes wrong at state.2 teacher-forced$"):
        report(failing).require()


def test_a_report_is_plain_json() -> None:
    infinite = Comparison("sample", float("inf"), float("inf"), None, ("shape (1,), expected (2,)",))
    data = report(rung(1, skipped="no torch"), rung(6, infinite)).to_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["passed"] is False
    assert [r["verdict"] for r in again["rungs"]] == ["not checked", "failed"]
    assert again["rungs"][1]["worst"] is None


# --- what the user allows, what would have passed, what was not looked at


def test_a_relative_tolerance_widens_with_the_reference() -> None:
    actual = images() * np.float32(1.01)
    found = compare("sample", actual, images(), rtol=0.02)
    assert found.required_atol == 0.0
    assert found.max_abs == pytest.approx(0.01, rel=1e-3)
    tight = compare("sample", actual, images(), rtol=0.005)
    assert tight.required_atol == pytest.approx(0.005, rel=1e-3)
    assert not tight.passes(0.004)
    assert tight.passes(0.006)


def test_beside_a_relative_tolerance_the_worst_place_is_what_it_does_not_cover() -> None:
    """One pixel is off by more, but large; the other has nothing that widens it."""
    expected = np.array([[100.0, 0.0, 1.0]], np.float32)
    found = compare("sample", expected + np.array([[0.5, 0.1, 0.0]], np.float32), expected, rtol=0.01)
    assert found.worst_index == (0, 1)
    assert found.max_abs == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(ParityError, match=r"sample is off by 0.1 beyond 0.01 relative at \(0, 1\), the tolerance is 0"):
        report(rung(6, found)).require()


def test_no_tolerance_saves_a_fault() -> None:
    found = compare("sample", changed((0, 0, 0, 0), np.nan), images(), rtol=1e9)
    assert found.required_atol == np.inf
    assert rung(6, found).required_atol == np.inf
    assert rung(6, found).to_dict()["required_atol"] is None


def test_tolerances_by_output() -> None:
    limits = Limits({"": 1e-2, "state.2": 1e-6}, {"state.1": 0.5})
    bad = Comparison("state.2 teacher-forced", 3e-4, 0.0)
    fresh = Comparison("fresh state.1", 3e-3, 0.0)
    found = rung(6, GOOD, bad, fresh, limits=limits)
    assert [found.limit(each) for each in (GOOD, bad, fresh)] == [1e-2, 1e-6, 1e-2]
    assert found.failures == (bad,)
    assert (limits.rtol_of("state.1"), limits.rtol_of("state.3")) == (0.5, 0.0)


def test_bytes_keep_their_levels_unless_they_are_named() -> None:
    sample = Comparison("sample", 1.0, 0.1)
    general, named = Limits({"": 1e-9}), Limits({"sample": 0.5})
    assert rung(6, sample, sample_atol=1.0, limits=general).passed
    assert not rung(6, sample, sample_atol=1.0, limits=named).passed


def test_levels_that_all_lean_one_way_fail() -> None:
    truncated = Comparison("sample", 1.0, 0.3)
    assert rung(6, truncated, sample_atol=1.0).passed
    failed = rung(6, truncated, sample_atol=1.0, sample_mean=0.0128)
    assert failed.verdict == "failed"
    with pytest.raises(ParityError, match=r"sample is off by 0.3 on average, the tolerance is 0.0128"):
        report(failed).require()


def test_what_is_off_everywhere_fails_within_a_wide_tolerance() -> None:
    spread = Comparison("state.1", 0.9, 0.2)
    assert rung(6, spread, atol=1.0).passed
    assert rung(6, spread, atol=1.0, mean=0.25).passed
    failed = rung(6, spread, atol=1.0, mean=0.125)
    assert not failed.passed
    with pytest.raises(ParityError, match=r"state.1 is off by 0.2 on average, the tolerance is 0.125"):
        report(failed).require()
    for limits in (Limits({"": 1.0}), Limits({"state.1": 1.0}), Limits({}, {"": 0.1})):
        assert rung(6, spread, atol=1.0, mean=0.125, limits=limits).passed  # the user's own tolerance is meant


def test_verified_fraction_counts_what_was_compared() -> None:
    whole = Coverage((1, 1), (3, 3), (3, 3), (2, 2), (1, 1))
    blind = Coverage((1, 1), (0, 3), (0, 3), (2, 2), (2, 8))
    assert whole.fraction == 1.0
    assert blind.fraction == 5 / 17
    assert report(rung(6, GOOD, coverage=blind)).verified_fraction == 5 / 17
    assert report().verified_fraction == 0.0


def test_a_report_says_what_it_did_not_check() -> None:
    skipped = tuple(rung(number, skipped="no checkpoint") for number in range(1, 6))
    unseen = rung(6, GOOD, unseen="an engine is closed")
    found = ParityReport("digits-5", "tensorrt", (*skipped, unseen), unchecked=("batch sizes 2, 3",))
    assert found.not_checked == (
        "rung 1, 2, 3, 4, 5: no checkpoint", "states and single steps: an engine is closed", "batch sizes 2, 3",
    )  # fmt: skip
    assert report(rung(6, GOOD)).not_checked == ()


def test_the_culprit_is_part_of_the_reason() -> None:
    culprit = Culprit(2, "mid", "Conv", "step.1/conv", ("mid.weight",), "Identity", 0.5, 1e-6, 1e-4)
    failed = ParityReport("digits-5", "onnxruntime", (rung(6, BAD),), culprit=culprit)
    with pytest.raises(
        ParityError, match=r"; step 2: block mid: operator Conv, value step.1/conv with mid.weight \(the"
    ):
        failed.require()
    data = json.loads(json.dumps(failed.to_dict(), allow_nan=False))
    assert data["bisect"]["operator"] == "Conv"
