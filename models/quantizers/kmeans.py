"""K-means in torch: Euclidean or spherical, on the CPU or a GPU, in memory or in blocks.

Shapes: N points, D dimensions, K centres, B rows of a block.

Spherical k-means (Dhillon and Modha 2001) assigns by the greatest inner product and normalises its centres; the
Euclidean one assigns by x·c − |c|²/2, which has the same argmax as −|x − c|². Both share everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantizers.points import BLOCK_ROWS, Points, unit

STARTS = ("kmeans++", "sample")
SEED_POINTS_PER_CODE = 64  # k-means++ looks at a sample: its cost is K passes over what it looks at


@dataclass(frozen=True)
class KMeansSettings:
    """How k-means runs.

    Attributes:
        spherical: cosine instead of squared distance; centres are unit vectors.
        iterations: upper bound of passes (mini-batches when `minibatch_rows` is exceeded).
        start: k-means++ (Arthur and Vassilvitskii 2007) or distinct sampled points.
        tolerance: stop when the objective improves by less than this share.
        minibatch_rows: with more points than this, each iteration looks at a random sample of so many
            (Sculley 2010: every centre moves by one over the number of points it has ever received).
        seed: of every random choice.
    """

    spherical: bool = False
    iterations: int = 50
    start: str = "kmeans++"
    tolerance: float = 1e-5
    minibatch_rows: int = 262_144
    seed: int = 0


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found.

    Attributes:
        centres: (K, D) float32, unit rows when spherical.
        objective: mean of cosine (spherical) or of −squared distance, one entry an iteration.
        revived: how often a dead centre was given a new place.
    """

    centres: Tensor
    objective: tuple[float, ...]
    revived: int


def kmeans(
    points: Points, codes: int, settings: KMeansSettings, on_iteration: Callable[[], None] | None = None
) -> KMeansResult:
    """Find `codes` centres of the points.

    A centre that no point chose is moved to the point that is served worst (each time another one), so every centre
    is in use whenever there are as many distinct points.

    Raises:
        ValueError: codes < 1, more codes than points, or an unknown start.
    """
    if settings.start not in STARTS:
        raise ValueError(f"k-means start is {settings.start!r}, must be {' or '.join(map(repr, STARTS))}")
    if not 1 <= codes <= points.rows:
        raise ValueError(f"k-means of {points.rows} points into {codes} centres: need 1 <= centres <= points")
    generator = torch.Generator().manual_seed(settings.seed)
    minibatch = points.rows > settings.minibatch_rows
    centres = _start(points, codes, settings, generator)
    counts = torch.zeros(codes, device=points.device)
    objective: list[float] = []
    revived = 0
    for _ in range(settings.iterations):
        looked_at = _sample(points, settings.minibatch_rows, generator) if minibatch else points
        sums, hits, total, worst = _pass(looked_at, centres, settings.spherical)
        centres, counts = _move(centres, counts if minibatch else torch.zeros_like(counts), sums, hits, settings)
        dead = torch.nonzero(counts == 0)[:, 0]
        if len(dead):
            centres, counts, moved = _revive(centres, counts, dead, worst)
            revived += moved
        objective.append(total / looked_at.rows)
        if on_iteration is not None:
            on_iteration()
        if not len(dead) and not minibatch and _settled(objective, settings.tolerance):
            break
    return KMeansResult(centres, tuple(objective), revived)


def nearest(block_BD: Tensor, centres_KD: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Choose the best centre of every row.

    Returns:
        (codes (B,) int64, gain (B,) float32): cosine-like inner product, or −squared distance when Euclidean.
    """
    scores_BK = block_BD @ centres_KD.T
    if spherical:
        best = scores_BK.max(dim=1)
        return best.indices, best.values
    scores_BK -= centres_KD.square().sum(dim=1) / 2
    best = scores_BK.max(dim=1)
    return best.indices, 2 * best.values - block_BD.square().sum(dim=1)


def _pass(points: Points, centres_KD: Tensor, spherical: bool) -> tuple[Tensor, Tensor, float, Tensor]:
    """Assign every point: per centre sum and count, the total gain, and the points served worst, worst first."""
    codes = len(centres_KD)
    sums_KD, hits_K = torch.zeros_like(centres_KD), torch.zeros(codes, device=points.device)
    total = 0.0
    worst_gain = torch.empty(0, device=points.device)
    worst_points = torch.empty(0, points.dim, device=points.device)
    for _, block_BD in points.blocks():
        chosen_B, gain_B = nearest(block_BD, centres_KD, spherical)
        sums_KD.index_add_(0, chosen_B, block_BD)
        hits_K.index_add_(0, chosen_B, torch.ones_like(gain_B))
        total += float(gain_B.double().sum())
        keep = torch.topk(gain_B, min(codes, len(gain_B)), largest=False).indices
        worst_gain, worst_points = torch.cat([worst_gain, gain_B[keep]]), torch.cat([worst_points, block_BD[keep]])
        order = torch.argsort(worst_gain)[:codes]
        worst_gain, worst_points = worst_gain[order], worst_points[order]
    return sums_KD, hits_K, total, worst_points


def _move(
    centres_KD: Tensor, counts_K: Tensor, sums_KD: Tensor, hits_K: Tensor, settings: KMeansSettings
) -> tuple[Tensor, Tensor]:
    """Move centres to the mean of all points they ever received (of this pass alone when counts are zero)."""
    counts = counts_K + hits_K
    means_KD = (centres_KD * counts_K[:, None] + sums_KD) / counts.clamp(min=1)[:, None]
    moved = torch.where(hits_K[:, None] > 0, means_KD, centres_KD)
    return (unit(moved) if settings.spherical else moved), counts


def _revive(centres_KD: Tensor, counts_K: Tensor, dead: Tensor, worst_points: Tensor) -> tuple[Tensor, Tensor, int]:
    groups = torch.unique(worst_points, dim=0, return_inverse=True)[1]  # copies of one point would die again
    order = torch.arange(len(groups), device=groups.device)
    first = torch.full_like(order, len(order)).scatter_reduce_(0, groups, order, "amin")
    chosen = first[first < len(order)].sort().values[: len(dead)]
    dead = dead[: len(chosen)]
    centres, counts = centres_KD.clone(), counts_K.clone()
    centres[dead], counts[dead] = worst_points[chosen], 1.0
    return centres, counts, len(dead)


def _settled(objective: list[float], tolerance: float) -> bool:
    return len(objective) > 1 and objective[-1] - objective[-2] <= tolerance * abs(objective[-2])


def _sample(points: Points, rows: int, generator: torch.Generator) -> Points:
    chosen = torch.randperm(points.rows, generator=generator)[: min(rows, points.rows)]
    parts = [points.take(part) for part in torch.split(chosen, BLOCK_ROWS)]
    return Points(torch.cat(parts), points.device)


def _start(points: Points, codes: int, settings: KMeansSettings, generator: torch.Generator) -> Tensor:
    pool = _sample(points, codes * SEED_POINTS_PER_CODE, generator)
    pool_PD = torch.cat([block for _, block in pool.blocks()])
    if settings.start == "sample":
        return pool_PD[:codes].clone()
    return _plus_plus(pool_PD, codes, generator)


def _plus_plus(pool_PD: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """Draw each next centre with probability proportional to the squared distance to the nearest one so far."""
    norms_P = pool_PD.square().sum(dim=1)
    chosen = [int(torch.randint(len(pool_PD), (1,), generator=generator))]
    distance_P = torch.full_like(norms_P, torch.inf)
    for _ in range(codes - 1):
        last = pool_PD[chosen[-1]]
        distance_P = torch.minimum(distance_P, norms_P - 2 * (pool_PD @ last) + last.square().sum()).clamp_(min=0)
        distance_P[chosen[-1]] = 0.0
        weights = distance_P.cpu() if float(distance_P.sum()) > 0 else torch.ones(len(pool_PD))
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return pool_PD[torch.tensor(chosen, device=pool_PD.device)].clone()
