"""RQ-KMeans: residual quantization by Euclidean k-means, the baseline that most claims are measured against.

Shapes: N documents, D dimensions, K codes, L levels.

Level 1 clusters the unit vectors; every further level clusters what the levels before left over (OneRec, Deng et al.
2025; additive residual quantization, Chen et al. 2010). Done well: k-means++ start, dead codes revived.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import FitReport, Quantizer, QuantizerError, QuantizerSettings, mean_cosine, register
from models.quantizers.kmeans import STARTS, KMeansSettings, kmeans
from models.quantizers.points import Points
from models.quantizers.residual import residual_codes, sum_codewords, without_nearest
from models.quantizers.settings import check_least


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise QuantizerError(f"rq_kmeans.start is {self.start!r}, must be one of {', '.join(STARTS)}")
        check_least("rq_kmeans", self, iterations=1, minibatch_rows=1)


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
            residuals = residuals.through(without_nearest(found.centres))
        return FitReport((mean_cosine(self, points),), revived)

    def _encode(self, block_ND: Tensor) -> Tensor:
        return residual_codes(self.codebooks, block_ND)

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        return sum_codewords(self.codebooks, codes_NL)
