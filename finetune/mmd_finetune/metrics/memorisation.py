"""Does the model repeat its training images? Distances to them against distances of, or to, images held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmd_export.errors import UndefinedError, UsageError
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, mean_with_interval, resampled_rows
from mmd_finetune.metrics.neighbours import distance_blocks
from mmd_finetune.metrics.real import Real

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

CELLS = 10
SMALLEST_CELL = 20


def memorisation(training: Real, held_out: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    """Chance that a generated image is nearer to the training set than to the held-out set; 1/2 if it knows neither.

    Features (T, d), (H, d), (N, d), H <= T. Of the larger training set a random subset of H rows is meant. With c of T
    training rows nearer to y than the nearest held-out row, the chance that none of them is in the subset is

        C(T - c, H) / C(T, H),

    so the mean over subsets needs no drawing. The interval is that of the generated rows.
    """
    total, held = len(training.features), len(held_out.features)
    require_split(total, held)
    nearer = torch.empty(len(generated), dtype=torch.float64)
    limits = nearest(generated, held_out.features)
    for rows, distances in distance_blocks(generated.double(), training.features.double()):
        nearer[rows.cpu()] = (distances < limits[rows, None]).sum(1).double().cpu()
    return mean_with_interval(1.0 - _none_drawn(nearer, total, held), resamples, seed)


def require_split(training: int, held_out: int, move: str = "hold out fewer") -> None:
    """Raise UsageError, with the next ``move``, unless ``memorisation`` can draw subsets of so many training images."""
    if held_out > training:
        raise UsageError(f"memorisation: {held_out} held-out images, {training} training images; {move}")


def copying(training: Real, held_out: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    """C_T of the data-copying test: far below 0, say -3, where samples hug the training set; Meehan et al. 2020.

        C_T = sum_cells P(cell) Z(cell),   Z = (U - n m / 2) / sqrt(n m (n + m + 1) / 12)

    U counts the pairs (held-out, generated) in which the generated image is farther from its nearest training image,
    ties by half; n and m are the sizes in the cell, P(cell) its share of the held-out images. Cells come from k-means
    on the training features; those with fewer than 20 images of either kind are left out, so is their share.
    The interval resamples the held-out and the generated images. Raises UndefinedError where no cell is left.
    """
    if len(training.features) < CELLS:
        raise UndefinedError(f"copying: {len(training.features)} training images are too few for {CELLS} cells")
    sides = held_out.once(_placed, training, seed), _placed(generated, training, seed)
    cells = _large_cells(*(labels for labels, _ in sides))
    draws = zip(*(resampled_rows(len(labels), resamples, seed + i) for i, (labels, _) in enumerate(sides)), strict=True)
    values = [
        _over_cells(cells, *((labels[rows], apart[rows]) for rows, (labels, apart) in zip(pair, sides, strict=True)))
        for pair in draws
    ]
    return centred_interval(_over_cells(cells, *sides), torch.tensor(values, dtype=torch.float64))


def _placed(features: Tensor, training: Real, seed: int) -> tuple[Tensor, Tensor]:
    """The cell of each of ``features`` (N, d), and its distance to the nearest training image; (N,) and (N,)."""
    labels = torch.from_numpy(training.once(_clusters, seed).predict(features.cpu().numpy())).long()
    return labels, nearest(features, training.features).cpu()


def _clusters(training: Tensor, seed: int) -> KMeans:
    from sklearn.cluster import KMeans

    return KMeans(CELLS, n_init=1, random_state=seed).fit(training.cpu().numpy())


def nearest(x: Tensor, y: Tensor) -> Tensor:
    """Distance of each row of ``x`` (N, d) to the nearest of ``y`` (M, d), float64 (N,)."""
    found = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows, distances in distance_blocks(x.double(), y.double()):
        found[rows] = distances.min(1).values
    return found


def z_score(held_out: Tensor, generated: Tensor) -> float:
    """Z of the Mann-Whitney U test for distances (n,) and (m,): positive where generated ones are the larger."""
    n, m = len(held_out), len(generated)
    ordered = held_out.sort().values
    below, not_above = (torch.searchsorted(ordered, generated, right=right) for right in (False, True))
    u = 0.5 * float((below + not_above).sum())
    return float((u - n * m / 2.0) / (n * m * (n + m + 1) / 12.0) ** 0.5)


def _large_cells(held_out: Tensor, generated: Tensor) -> list[int]:
    """Cells with enough images of both kinds; labels (n,) and (m,). Raises UndefinedError if there is none."""
    counts = [torch.bincount(labels, minlength=CELLS) for labels in (held_out, generated)]
    cells = [cell for cell in range(CELLS) if min(int(count[cell]) for count in counts) >= SMALLEST_CELL]
    if not cells:
        raise UndefinedError(
            f"copying: {len(held_out)} held-out and {len(generated)} generated images leave no cell of {CELLS} "
            f"with {SMALLEST_CELL} of both; give more of them"
        )
    return cells


def _over_cells(cells: list[int], held_out: tuple[Tensor, Tensor], generated: tuple[Tensor, Tensor]) -> float:
    """The mean of the cells' Z, weighed by the held-out images in them; each side is (labels, distances)."""
    total, weight = 0.0, 0
    for cell in cells:
        p, q = (distances[labels == cell] for labels, distances in (held_out, generated))
        if len(p) and len(q):  # a draw may leave a cell empty
            total, weight = total + len(p) * z_score(p, q), weight + len(p)
    return total / max(weight, 1)


def _none_drawn(c: Tensor, total: int, drawn: int) -> Tensor:
    """C(T - c, H) / C(T, H) by logarithms of factorials, 0 where T - c < H; Tensor (N,)."""
    rest = (total - c - drawn).clamp_min(0.0)
    logarithm = (
        torch.lgamma(total - c + 1.0) - torch.lgamma(rest + 1.0)
        - torch.lgamma(torch.tensor(total + 1.0, dtype=torch.float64))
        + torch.lgamma(torch.tensor(total - drawn + 1.0, dtype=torch.float64))
    )  # fmt: skip
    return torch.where(total - c < drawn, torch.zeros_like(c), logarithm.exp())
