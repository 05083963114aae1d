"""Bootstrap intervals: the mean's against its standard error, and draws that centre on the estimate."""

from __future__ import annotations

import pytest
import torch

from mmd_finetune.metrics.bootstrap import centred_interval, mean_with_interval, multiplicities, resampled_rows


def test_the_interval_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_with_interval(values, 8000, seed=1)
    error = float(values.std(correction=0)) / 20.0
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.04)
    assert found.high + found.low == pytest.approx(2 * found.value, abs=0.2 * error)


def test_no_resamples_no_interval() -> None:
    found = mean_with_interval(torch.arange(4.0), 0, seed=0)
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_equal_values_have_an_interval_without_width() -> None:
    found = mean_with_interval(torch.full((10,), 2.0), 50, seed=0)
    assert (found.low, found.high) == (2.0, 2.0)


def test_the_bias_of_the_draws_does_not_move_the_interval() -> None:
    draws = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    low, high = centred_interval(5.0, draws).low, centred_interval(5.0, draws + 100.0).high
    assert low == pytest.approx(5.0 - 0.95, abs=1e-9)
    assert high == pytest.approx(5.0 + 0.95, abs=1e-9)


def test_multiplicities_are_the_drawn_rows_behind_a_line_of_ones() -> None:
    weights = multiplicities(7, 3, seed=5)
    assert weights[0].tolist() == [1.0] * 7
    for line, rows in zip(weights[1:], resampled_rows(7, 3, seed=5), strict=True):
        assert line.tolist() == [float((rows == i).sum()) for i in range(7)]
    assert torch.equal(weights, multiplicities(7, 3, seed=5))
    assert not torch.equal(weights, multiplicities(7, 3, seed=6))
