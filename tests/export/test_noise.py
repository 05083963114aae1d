"""The generator against the published vectors, its distribution, and what must not change a drawn image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmd_export.errors import UsageError
from mmd_export.noise import box_muller, normal, philox4x32, sampler_noise

PI_COUNTER = "243f6a88 85a308d3 13198a2e 03707344"
KNOWN_ANSWERS = [  # Random123 1.14.0, tests/kat_vectors, philox4x32 10
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI_COUNTER, "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_random123_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox4x32(_words(counter)[None], _words(key)).tolist() == [_words(answer).tolist()]


def test_one_key_a_row_gives_the_same_as_one_row_a_call() -> None:
    counters = np.stack([_words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.stack([_words(key) for _, key, _ in KNOWN_ANSWERS])
    assert philox4x32(counters, keys).tolist() == [_words(answer).tolist() for _, _, answer in KNOWN_ANSWERS]


def test_box_muller_by_hand() -> None:
    half, quarter = 2**31, 2**30
    z = box_muller(np.array([[half, 0, half, quarter]], dtype=np.uint32))[0]
    r = np.sqrt(-2 * np.log(0.5 + 2.0**-33))
    tiny = 2 * np.pi * 2.0**-33
    np.testing.assert_allclose(
        z, [r * np.cos(tiny), r * np.sin(tiny), -r * np.sin(tiny), r * np.cos(tiny)], 1e-12, 1e-15
    )


def test_box_muller_is_finite_at_the_extreme_words() -> None:
    extreme = np.array([[0, 0, 0, 2**32 - 1], [2**32 - 1, 0, 2**32 - 1, 2**32 - 1]], dtype=np.uint32)
    z = box_muller(extreme)
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 6.77  # sqrt(-2 ln 2**-33) = 6.764


def test_normal_follows_the_specification_word_by_word() -> None:
    seed, image, stream = 0x0123456789ABCDEF, 7, 3
    counters = np.array([[block, stream, image, 0] for block in range(3)], dtype=np.uint32)
    words = philox4x32(counters, np.array([0x89ABCDEF, 0x01234567], dtype=np.uint32))
    expected = box_muller(words).reshape(-1)[:9].astype(np.float32)
    found = normal(seed, (1, 3, 3), range(7, 8), stream=3)
    assert found.dtype == np.float32
    assert found.shape == (1, 1, 3, 3)
    assert found.reshape(-1).tolist() == expected.tolist()


def test_a_million_values_are_unit_normal() -> None:
    z = normal(2026, (1, 1000, 100), 10).reshape(-1).astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(z)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 4 * np.sqrt(24 / n)
    assert stats.kstest(z, "norm").pvalue > 0.01
    for lag in (1, 2, 4):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 4 / np.sqrt(n)


def test_an_image_does_not_depend_on_its_batch() -> None:
    whole = normal(5, (3, 5, 7), 6)
    for image in range(6):
        assert np.array_equal(normal(5, (3, 5, 7), range(image, image + 1))[0], whole[image])
    assert np.array_equal(normal(5, (3, 5, 7), range(2, 6, 2)), whole[2:6:2])


def test_first_moves_the_window_in_every_array() -> None:
    whole, tail = sampler_noise(5, 6, (1, 4, 4), 2), sampler_noise(5, 2, (1, 4, 4), 2, first=4)
    assert np.array_equal(tail["noise"], whole["noise"][4:])
    assert np.array_equal(tail["step_noise"], whole["step_noise"][:, 4:])


def test_streams_seeds_and_images_are_independent() -> None:
    base = normal(1, (1, 100, 100), 1).reshape(-1)
    high = 1 + 2**32
    others = [normal(2, (1, 100, 100), 1), normal(high, (1, 100, 100), 1), normal(1, (1, 100, 100), 1, stream=1)]
    others.append(normal(1, (1, 100, 100), range(1, 2)))
    for other in others:
        assert abs(np.corrcoef(base, other.reshape(-1))[0, 1]) < 4 / np.sqrt(base.size)


def test_sampler_noise_names_and_shapes() -> None:
    assert set(sampler_noise(0, 2, (1, 2, 2), 0)) == {"noise"}
    inputs = sampler_noise(0, 2, (1, 2, 2), 3)
    assert inputs["step_noise"].shape == (3, 2, 1, 2, 2)
    for step in range(3):
        assert np.array_equal(inputs["step_noise"][step], normal(0, (1, 2, 2), 2, stream=step + 1))


def test_no_image_is_an_empty_array() -> None:
    assert normal(0, (1, 2, 2), 0).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_bad_seed_is_refused_with_both_values(seed: Any) -> None:
    with pytest.raises(UsageError, match=r"seed is .*18446744073709551615"):
        normal(seed, (1, 2, 2), 1)


def test_other_bad_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="count is -1"):
        sampler_noise(0, -1, (1, 2, 2), 0)
    with pytest.raises(UsageError, match="image index is 4294967296"):
        sampler_noise(0, 2, (1, 2, 2), 0, first=2**32 - 1)
    with pytest.raises(UsageError, match="stream is -1"):
        normal(0, (1, 2, 2), 1, stream=-1)


def test_the_vectors_of_the_published_page_hold() -> None:
    page = (Path(__file__).parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d+)` \| (\d+) \| (\d+) \| `([0-9a-f ]+)` \| .* \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 5
    for seed, stream, image, bits in rows:
        values = normal(int(seed), (1, 1, 4), range(int(image), int(image) + 1), stream=int(stream))
        assert [f"{word:08x}" for word in values.view(np.uint32).reshape(-1)] == bits.split()
