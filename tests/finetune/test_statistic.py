"""The MMD^2 in blocks against the formula on the whole, its gradient, and the real side as one element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune import statistic
from mmd_finetune.embedding import batch_rows, embed_all, embed_landmarks, find_landmarks
from mmd_finetune.kernels import KERNELS, Cubic, Gaussian, Kernel, Linear, make_kernel
from mmd_finetune.mmd import biased_mmd2, unbiased_mmd2
from mmd_finetune.statistic import mmd2
from mmd_finetune.world import World

ALONE = World()


def draw(rows: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dimensions, dtype=torch.float64, generator=generator)


def kernels() -> list[Kernel]:
    return [make_kernel(name, draw(30, 3, seed=9)) for name in sorted(KERNELS)]


@pytest.fixture(params=[(512, 2048), (3, 4), (1, 1), (7, 5)], ids=str)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks larger than everything, and blocks that fit neither side."""
    monkeypatch.setitem(statistic.BLOCKS, "cpu", request.param)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: type(kernel).__name__)
def test_blocks_give_the_value_and_the_gradient_of_the_formula(kernel: Kernel, biased: bool, blocks: None) -> None:
    x, y = draw(10, 3, seed=1).requires_grad_(True), draw(13, 3, seed=2)
    value = mmd2(x, kernel, embed_all(kernel, y, biased=biased), biased=biased, world=ALONE)
    expected = (biased_mmd2 if biased else unbiased_mmd2)(kernel, x, y)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    (gradient,), (wanted,) = torch.autograd.grad(3.0 * value, x), torch.autograd.grad(3.0 * expected, x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: type(kernel).__name__)
def test_gradcheck(kernel: Kernel, biased: bool) -> None:
    x, embedding = draw(5, 3, seed=3).requires_grad_(True), embed_all(kernel, draw(7, 3, seed=4), biased=biased)
    assert torch.autograd.gradcheck(lambda rows: mmd2(rows, kernel, embedding, biased=biased, world=ALONE), (x,))


def test_float32_features_get_a_float32_gradient_of_a_float64_statistic() -> None:
    kernel = Gaussian((2.0,))
    x, y = draw(6, 3, seed=5).float().requires_grad_(True), draw(9, 3, seed=6)
    value = mmd2(x, kernel, embed_all(kernel, y, biased=False), world=ALONE)
    value.backward()
    assert value.dtype == torch.float64
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_one_generated_image_has_no_pair() -> None:
    with pytest.raises(UsageError, match="at least 2 feature vectors on each side, not 1"):
        mmd2(draw(1, 3, seed=0), Linear(), embed_all(Linear(), draw(4, 3, seed=1), biased=False), world=ALONE)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "rational-quadratic", "energy"])
def test_every_image_as_a_landmark_is_the_mean_of_all(name: str) -> None:
    y, x = draw(25, 4, seed=7), draw(6, 4, seed=8)
    kernel = make_kernel(name, y)
    all_of_it, projected = embed_all(kernel, y, biased=True), embed_landmarks(kernel, y, y)
    torch.testing.assert_close(projected.weights, all_of_it.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(projected.squared_norm, all_of_it.squared_norm, rtol=1e-9, atol=1e-12)
    values = [mmd2(x, kernel, each, world=ALONE) for each in (all_of_it, projected)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)


def test_landmarks_that_span_the_features_are_exact_for_the_linear_kernel() -> None:
    y, x = draw(200, 4, seed=9) + 0.5, draw(6, 4, seed=10)
    landmarks = find_landmarks(y, 5, seed=0)
    exact, projected = embed_all(Linear(), y, biased=True), embed_landmarks(Linear(), y, landmarks)
    torch.testing.assert_close(mmd2(x, Linear(), projected, world=ALONE), mmd2(x, Linear(), exact, world=ALONE))


def test_more_landmarks_come_closer_and_the_weights_beat_a_plain_average() -> None:
    y, x = draw(600, 3, seed=11) * 1.5, draw(50, 3, seed=12)
    kernel = make_kernel("gaussian", y)
    whole = embed_all(kernel, y, biased=True)

    def miss(weights: Tensor, points: Tensor) -> float:
        """|mu - mu'|^2, what the weights minimise."""
        across = float(weights @ kernel(points, y).mean(1))
        return float(whole.squared_norm) - 2.0 * across + float(weights @ kernel(points, points) @ weights)

    misses = []
    for count in (4, 16, 64):
        found = embed_landmarks(kernel, y, find_landmarks(y, count, seed=0))
        misses.append(miss(found.weights, found.points))
        assert misses[-1] < miss(torch.full_like(found.weights, 1.0 / count), found.points)
    assert misses[2] < 0.1 * misses[1] < 0.02 * misses[0]
    values = [float(mmd2(x, kernel, each, world=ALONE)) for each in (found, whole)]
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_a_projection_is_never_longer_than_what_is_projected() -> None:
    y = draw(300, 3, seed=13)
    kernel = make_kernel("rational-quadratic", y)
    whole = float(embed_all(kernel, y, biased=True).squared_norm)
    for count in (2, 8, 32):
        assert float(embed_landmarks(kernel, y, find_landmarks(y, count, seed=1)).squared_norm) <= whole + 1e-9


def test_landmarks_repeat_bit_for_bit_and_depend_on_the_seed() -> None:
    y = draw(500, 6, seed=14)
    first, again, other = (find_landmarks(y, 20, seed) for seed in (0, 0, 1))
    assert first.shape == (20, 6)
    assert first.dtype == torch.float64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_landmarks_than_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"--landmarks 9: there are only 8 real images"):
        find_landmarks(draw(8, 2, seed=0), 9, seed=0)


def test_every_image_is_seen_once_an_epoch() -> None:
    epochs = [[batch_rows(3, 5 * epoch + turn, 4, 22) for turn in range(5)] for epoch in range(2)]
    for epoch in epochs:
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen) == 20
        assert int(seen.max()) < 22
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert torch.equal(batch_rows(3, 7, 4, 22), epochs[1][2])
    assert not torch.equal(batch_rows(4, 7, 4, 22), epochs[1][2])


def test_a_batch_of_real_images_is_unbiased_for_the_bank() -> None:
    bank, x, kernel = draw(24, 3, seed=15) + 0.4, draw(10, 3, seed=16), Cubic()
    exact = mmd2(x, kernel, embed_all(kernel, bank, biased=False), world=ALONE)
    values = torch.stack(
        [
            mmd2(x, kernel, embed_all(kernel, bank[batch_rows(0, i, 6, 24)], biased=False), world=ALONE)
            for i in range(400)
        ]
    )
    assert abs(float(values.mean() - exact)) < 4.0 * float(values.std()) / 400**0.5
