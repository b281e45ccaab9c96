"""RQ-KMeans: residual quantization by Euclidean k-means, the baseline that every claim is measured against.

Shapes: N documents, D dimensions, K codes, L levels.

Level 1 clusters the unit vectors; every further level clusters what the levels before left over (OneRec, Deng et al.
2025; additive residual quantization, Chen et al. 2010). Done well: k-means++ start, dead codes revived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import FitReport, Quantizer, QuantizerSettings, mean_cosine, register
from models.quantizers.kmeans import KMeansSettings, kmeans, nearest
from models.quantizers.points import Points, Transform


@dataclass(frozen=True)
class RQKMeansSettings(QuantizerSettings):
    """Settings of RQ-KMeans.

    Attributes:
        iterations: upper bound of k-means iterations a level.
        start: "kmeans++" or "sample".
        minibatch_rows: see `KMeansSettings`.
    """

    iterations: int = 50
    start: str = "kmeans++"
    minibatch_rows: int = 262_144


@register
class RQKMeans(Quantizer):
    """Residual k-means; kind "residual": the code nearest to the residual, which then loses it."""

    system = "rq_kmeans"
    kind = "residual"
    settings_class = RQKMeansSettings

    def __init__(self, settings: RQKMeansSettings | None = None) -> None:
        super().__init__(settings)
        self.settings = settings or RQKMeansSettings()

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        settings = self.settings
        task = bar.add_task("rq-kmeans", total=len(self.level_sizes) * settings.iterations)
        self.codebooks, revived, residuals = [], 0, points
        for level, codes in enumerate(self.level_sizes):
            found = kmeans(
                residuals,
                codes,
                KMeansSettings(
                    iterations=settings.iterations,
                    start=settings.start,
                    minibatch_rows=settings.minibatch_rows,
                    seed=settings.seed + level,
                ),
                lambda: bar.advance(task),
            )
            bar.update(task, completed=(level + 1) * settings.iterations)
            self.codebooks.append(found.centres)
            revived += found.revived
            residuals = residuals.through(_without_nearest(found.centres))
        return FitReport((mean_cosine(self, points),), revived)

    def _encode(self, block_ND: Tensor) -> Tensor:
        codes, residual_ND = [], block_ND
        for codebook_KD in self.codebooks:
            chosen_N, _ = nearest(residual_ND, codebook_KD, spherical=False)
            residual_ND = residual_ND - codebook_KD[chosen_N]
            codes.append(chosen_N)
        return torch.stack(codes, dim=1)

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        total_ND = torch.zeros(len(codes_NL), self.codebooks[0].shape[1], device=codes_NL.device)
        for codebook_KD, codes_N in zip(self.codebooks, codes_NL.T, strict=True):
            total_ND += codebook_KD[codes_N.clamp(min=0)] * (codes_N >= 0)[:, None]
        return total_ND


def _without_nearest(centres_KD: Tensor) -> Transform:
    def subtract(block_ND: Tensor) -> Tensor:
        return block_ND - centres_KD[nearest(block_ND, centres_KD, spherical=False)[0]]

    return subtract
