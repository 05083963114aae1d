"""Rung 7: the estimators against direct formulas, the test's level and power, and its place in a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.distribution import DistributionOptions, distribution_tests, find_encoder
from mmd_export.commands.verify import verify
from mmd_export.comparison import Limits
from mmd_export.distribution import (
    frechet_distance,
    median_squared_distance,
    paired_mmd2,
    paired_test,
    permutation_test,
    pixels,
    projection,
    same_noise_test,
    squared_distances,
)
from mmd_export.errors import ParityError, UsageError
from mmd_export.parity import Rung

Array = NDArray[Any]


def draws(seed: int, count: int = 60, shift: float = 0.0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 5)) + shift


def test_mmd2_is_the_direct_formula() -> None:
    x, y = draws(0, 20), draws(1, 31)
    mmd2, s2, _ = permutation_test(x, y, 9)
    assert s2 == pytest.approx(median_squared_distance(np.concatenate([x, y])))
    k = [np.exp(-squared_distances(a, b) / (2 * s2)) for a, b in ((x, x), (y, y), (x, y))]
    inside = [(each.sum() - np.trace(each)) / (len(each) * (len(each) - 1)) for each in k[:2]]
    assert mmd2 == pytest.approx(inside[0] + inside[1] - 2 * k[2].mean(), rel=1e-10)


def test_the_permutation_test_keeps_its_level_and_finds_a_shift() -> None:
    values = [permutation_test(draws(2 * i), draws(2 * i + 1), 99)[2] for i in range(100)]
    assert np.mean([value <= 0.05 for value in values]) <= 0.11  # 100 draws of 5 %: above 0.11 once in 200
    assert 0.35 < float(np.mean(values)) < 0.65
    assert permutation_test(draws(0), draws(1, shift=1.0), 99)[2] == pytest.approx(0.01)


def test_mmd2_of_pairs_is_the_direct_formula() -> None:
    x, y = draws(0, 1500), draws(1, 1500, shift=0.2)  # more than a block
    mmd2, s2, _ = paired_test(x, y, 9)
    assert s2 == pytest.approx(median_squared_distance(np.concatenate([x, y])))
    k = [np.exp(-squared_distances(a, b) / (2 * s2)) for a, b in ((x, x), (y, y), (x, y), (y, x))]
    h = k[0] + k[1] - k[2] - k[3]
    expected = (h.sum() - np.trace(h)) / (len(x) * (len(x) - 1))
    assert mmd2 == pytest.approx(expected, rel=1e-9) == paired_mmd2(x, y, s2)
    assert paired_test(x, y, 9) == pytest.approx(paired_test(y, x, 9), rel=1e-9)


def test_the_test_of_pairs_keeps_its_level() -> None:
    """On independent pairs, and on pairs that are nearly alike and differ either way."""

    def near(seed: int) -> tuple[Array, Array]:
        base, error = draws(seed), 1e-3 * draws(seed + 1)
        return base + error, base - error

    def apart(seed: int) -> tuple[Array, Array]:
        return draws(seed), draws(seed + 1)

    for pair in (apart, near):
        values = [paired_test(*pair(2 * i), 99)[2] for i in range(100)]
        assert np.mean([value <= 0.05 for value in values]) <= 0.11
        assert 0.35 < float(np.mean(values)) < 0.65


def test_a_small_difference_shows_in_pairs_alone() -> None:
    x = draws(3, 100)
    y = x + 0.05 + 0.01 * draws(4, 100)
    assert permutation_test(x, y, 99)[2] > 0.5
    assert paired_test(x, y, 99)[2] == 0.01


def test_a_difference_within_the_tolerance_of_the_pixels_passes() -> None:
    x = draws(3, 100)
    for tolerance, passed in ((0.06, True), (0.04, False)):
        moved = [x + tolerance, x - tolerance]
        found = same_noise_test("features", x + 0.05, x, moved, 0.05, 99)
        assert (found.p_value, found.passed) == (0.01, passed)
        assert found.tolerated == pytest.approx(paired_mmd2(x, moved[0], found.squared_bandwidth), rel=0.1)


def test_frechet_distance_is_its_formula() -> None:
    a, b = draws(0, 40), draws(1, 50, shift=0.3)
    shift, (first, second) = a.mean(0) - b.mean(0), (np.cov(each, rowvar=False) for each in (a, b))
    expected = shift @ shift + np.trace(first + second - 2.0 * scipy.linalg.sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(UsageError, match="more than half of the samples have equal features"):
        permutation_test(np.zeros((30, 2)), np.zeros((30, 2)))
    with pytest.raises(UsageError, match="NaN or infinite"):
        permutation_test(np.full((30, 2), np.nan), draws(0, 30)[:, :2])
    with pytest.raises(UsageError, match=r"features \(60, 5\) and \(60, 4\)"):
        permutation_test(draws(0), draws(1)[:, :4])
    with pytest.raises(UsageError, match=r"pairs \(60, 5\) and \(50, 5\)"):
        paired_test(draws(0), draws(1, 50))
    with pytest.raises(UsageError, match="--count is 10, rung 7 needs at least 100"):
        DistributionOptions(count=10)
    with pytest.raises(UsageError, match="--level is 1"):
        DistributionOptions(level=1.0)
    with pytest.raises(UsageError, match=r"99 permutations cannot tell p below 0\.005"):
        DistributionOptions(permutations=99)


def test_encoders_of_numpy() -> None:
    images = np.random.default_rng(0).normal(size=(7, 3, 6, 5)).astype(np.float32)
    assert np.array_equal(pixels(images), images.reshape(7, -1))
    assert projection(images).shape == (7, 64)
    assert np.array_equal(projection(images[:, :1]), pixels(images[:, :1]))  # fewer pixels than directions
    found = np.linalg.norm(projection(images)[0] - projection(images)[1]) ** 2 / 64
    assert 0.5 < found / (np.linalg.norm(pixels(images)[0] - pixels(images)[1]) ** 2 / 90) < 2.0


def test_encoders_of_finetune_and_unknown_ones() -> None:
    features = find_encoder("digits-mlp", (1, 8, 8))(np.zeros((3, 1, 8, 8), np.float32))
    assert features.shape == (3, 64)
    with pytest.raises(UsageError, match="unknown"):
        find_encoder("inception-v9", (1, 8, 8))
    with pytest.raises(UsageError, match="takes images"):
        find_encoder("digits-mlp", (3, 8, 8))


def test_equal_samples_pass_on_the_same_noise() -> None:
    x = draws(3, 100)
    found = same_noise_test("features", x, x, [x + 1e-4, x - 1e-4], 0.005, 99)
    assert found.passed
    assert (found.p_value, found.mmd2) == (1.0, 0.0)
    off = same_noise_test("features", x + 1e-6, x, [x + 1e-4, x - 1e-4], 0.005, 999)
    assert off.passed
    assert off.tolerated is not None
    assert 0.0 < off.mmd2 < 1e-3 * off.tolerated


# --- of a bundle


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rung-7") / "digits"
    build(BuildOptions("digits", "onnx", out, steps=2, batch="1,50", verify=False))
    return out


SMALL = DistributionOptions(count=200, permutations=299)


def test_rung_7_against_the_checkpoint(digits: Path) -> None:
    report = verify(Bundle.open(digits), checkpoint="digits", distribution=SMALL)
    report.require()
    rung = report.rungs[-1]
    assert (rung.number, rung.verdict) == (7, "passed")
    assert [(test.noise, test.count, test.level) for test in rung.tests] == [
        ("same", 200, 0.005),
        ("fresh", 200, 0.005),
    ]
    assert rung.tests[0].frechet < 1e-6 < rung.tests[1].frechet
    data = report.to_dict()["rungs"][-1]
    assert data["worst"] is None
    assert {"p_value", "mmd2", "frechet", "passed"} <= set(data["tests"][0])


@pytest.mark.parametrize("precision", ["fp16", "w4"])
def test_what_a_precision_may_be_off_is_no_other_distribution(digits: Path, tmp_path: Path, precision: str) -> None:
    bundle = build(BuildOptions("digits", "onnx", tmp_path / "b", precision, batch="50", steps=2, verify=False))
    against = replace(SMALL, against=str(digits))  # the reference in float32; rungs 1 to 5 are those of ``digits``
    report = verify(bundle, distribution=against)
    artefact, distribution = report.rungs[-2:]
    assert (artefact.number, artefact.verdict) == (6, "passed")
    (same, _) = distribution.tests
    assert same.passed
    assert same.tolerated is not None
    assert same.mmd2 < same.tolerated
    tight = verify(bundle, distribution=against, limits=Limits({"": 1e-9}))
    assert not tight.rungs[-1].tests[0].passed


def test_rung_7_against_another_bundle(digits: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(digits)
    report = verify(bundle, distribution=DistributionOptions(200, against=str(digits), permutations=299))
    assert report.rungs[-1].verdict == "passed"
    other = tmp_path / "other"
    build(BuildOptions("digits", "onnx", other, steps=1, verify=False))
    with pytest.raises(UsageError, match=r"--against digits-1 has plan .*, bundle digits-2 has"):
        verify(bundle, distribution=DistributionOptions(200, against=str(other)))


def test_rung_7_without_a_reference_is_refused(digits: Path) -> None:
    with pytest.raises(UsageError, match=r"--distribution compares with samples of the reference: .* --against BUNDLE"):
        verify(Bundle.open(digits), distribution=SMALL)


def test_an_artefact_that_is_not_finite_fails_rung_7() -> None:
    def broken(seed: int) -> NDArray[np.float32]:
        images = np.random.default_rng(seed).normal(0.0, 1.0, (200, 1, 8, 8)).astype(np.float32)
        images[7, 0, 3, 3] = np.nan
        return images

    tests = distribution_tests(broken, lambda seed: np.nan_to_num(broken(seed)), projection, SMALL, 1e6)
    assert not any(test.passed for test in tests)
    assert json.loads(json.dumps(tests[0].to_dict(), allow_nan=False))["frechet"] is None


def test_another_distribution_fails_rung_7(digits: Path) -> None:
    shifted = distribution_tests(
        lambda seed: np.random.default_rng(seed).normal(0.5, 1, (200, 1, 8, 8)).astype(np.float32),
        lambda seed: np.random.default_rng(seed).normal(0.0, 1, (200, 1, 8, 8)).astype(np.float32),
        projection,
        SMALL,
        1e-4,
    )
    assert not any(test.passed for test in shifted)
    report = verify(Bundle.open(digits))
    failed = replace(report, rungs=(*report.rungs, Rung(7, tests=shifted)))
    assert not failed.passed
    with pytest.raises(ParityError, match=r"rung 7 .* failed: on same noise MMD\^2 is .* p 0.00333 at level 0.005"):
        failed.require()
