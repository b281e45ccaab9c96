"""ACRQ: head items shape the codebooks, tail items only extend them; SA2CRQ adds SARQ's depths (sections 2.2 and 2.3).

Shapes: N documents, D dimensions, L levels, K codes of a level, A anchor rows of a level, B rows of a batch.

The text's formulas did not survive; this is what its words say. With residuals r_0 = x, r_l = r_{l−1} − e_l(c_l) and
the depth d(x) of an item (L without SARQ), the loss of an item sums to its own depth:

    ‖x − Σ_{l ≤ d} e_l(c_l)‖²  +  Σ_{l ≤ d} ‖sg[r_{l−1}] − e_l(c_l)‖²          (sg: no gradient)

- **Stage 1, head.** Codebooks of A_1 ≤ A_2 ≤ … rows: few codes first for coarse semantics, more for fine residuals.
  They start from k-means of the head items' residuals and are trained on head items alone. With SARQ the path tables
  are counted on the head items, anew before every epoch.
- **Stage 2, tail.** Each codebook becomes [anchors; extension]. Anchors are frozen: the gradient of their rows is
  masked to zero. The extension starts from k-means of the residuals that the anchors serve worst, and is trained on
  tail items. With SARQ the path tables are counted on all items, anew before every epoch; the last ones are kept.

Three differences from the paper: the encoder of the RQ-VAE is the retriever's own, so nothing stands between vector and
codebooks and there is no commitment loss; an index does not know which documents are head, so all documents choose
among all rows; and stage 2 does not keep to the head's path tables, which know no path through an extension row: they
would end each after one code, however many items share it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import FitReport, Quantizer, QuantizerError, QuantizerSettings, mean_cosine, register
from models.quantizers.kmeans import KMeansSettings, kmeans, nearest
from models.quantizers.lengths import RuledQuantizer
from models.quantizers.points import BLOCK_ROWS, Points, VectorError
from models.quantizers.residual import residual_codes, sum_codewords, without_nearest
from models.quantizers.sarq import check_threshold, path_rule
from models.quantizers.settings import check_least, check_positive

Step = Callable[[], None]
START_ROWS = 262_144  # k-means starts from at most so many items of a group


@dataclass(frozen=True)
class ACRQSettings(QuantizerSettings):
    """Settings of ACRQ; `level_sizes` must not fall and count anchors and extension together.

    Attributes:
        extension: share of each level's rows that the tail adds, above 0 and below 1.
        head_share: share of the documents that are head, above 0 and below 1.
        epochs: passes of each stage's training.
        batch_size: rows of a step.
        learning_rate: of Adam, in units of a unit vector's coordinates; falls to zero on a half cosine.
        kmeans_iterations: upper bound of k-means iterations a level at the start of a stage.
    """

    extension: float = 0.25
    head_share: float = 0.2
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.002
    kmeans_iterations: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("extension", self.extension), ("head_share", self.head_share)):
            if not 0 < value < 1:
                raise QuantizerError(f"acrq.{name} is {value}, must be a share above 0 and below 1")
        if list(self.level_sizes) != sorted(self.level_sizes):
            raise QuantizerError(
                f"acrq.level_sizes is {list(self.level_sizes)}: levels must not get smaller, e.g. "
                f"{sorted(self.level_sizes)}"
            )
        check_least("acrq", self, epochs=0, batch_size=1, kmeans_iterations=1)
        if self.epochs:
            check_positive("acrq", self, "learning_rate")

    @property
    def anchors(self) -> tuple[int, ...]:
        """A of each level: at least one row, and one less than all."""
        return tuple(min(max(round((1 - self.extension) * size), 1), size - 1) for size in self.level_sizes)

    @property
    def extensions(self) -> tuple[int, ...]:
        """Rows of each level that the tail adds."""
        return tuple(size - anchors for size, anchors in zip(self.level_sizes, self.anchors, strict=True))

    def head(self, documents: int) -> int:
        """Give how many of so many documents are head."""
        return min(math.ceil(self.head_share * documents), documents)


@register
class ACRQ(Quantizer):
    """Residual quantizer of anchors and extensions; kind "residual", SIDs of full length.

    Attributes:
        interactions_N: interactions of every document that `fit` is given, (N,); None where they are not known. Head
            are the documents with most interactions; equal ones, and all where they are not known, by density: the
            size of their cell when the vectors are clustered into A_1 cells.
    """

    system = "acrq"
    kind = "residual"
    settings_class: ClassVar[type[ACRQSettings]] = ACRQSettings

    def __init__(self, settings: ACRQSettings | None = None) -> None:
        self.settings: ACRQSettings = settings or self.settings_class()
        super().__init__(self.settings)
        self.interactions_N: NDArray[np.integer[Any]] | None = None

    @property
    def least_documents(self) -> int:
        """As many as give the head a document for every anchor of a level, and the tail one for every extension row."""
        settings = self.settings
        anchors, extensions = max(settings.anchors), max(settings.extensions)
        near = max((anchors - 1) / settings.head_share, extensions / (1 - settings.head_share))  # but for rounding
        first = max(max(settings.level_sizes), math.floor(near) - 1)
        return next(
            n for n in itertools.count(first) if settings.head(n) >= anchors and n - settings.head(n) >= extensions
        )

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        settings = self.settings
        head, tail = self._split(points)
        task = bar.add_task(self.system, total=2 * settings.epochs)

        def advance() -> None:
            bar.advance(task)

        self.codebooks, revived = _start(points, head, settings)
        _train(self, points, head, [0] * len(settings.anchors), lambda: self._count_paths(points, head), advance)
        self.codebooks, more = _extend(points, tail, self.codebooks, settings)
        everything = torch.arange(points.rows)
        _train(self, points, tail, settings.anchors, lambda: self._count_paths(points, everything), advance)
        self._count_paths(points, everything)
        return FitReport((mean_cosine(self, points),), revived + more)

    def _split(self, points: Points) -> tuple[Tensor, Tensor]:
        """Give the rows of head and tail, each ascending."""
        settings, n = self.settings, points.rows
        head = settings.head(n)
        for name, rows, codes in (("head", head, settings.anchors), ("tail", n - head, settings.extensions)):
            if rows < max(codes):
                raise VectorError(
                    f"{rows} of {n} documents are {name} (head_share {settings.head_share}), its largest level has "
                    f"{max(codes)} codes: use fewer codes, another head_share or more documents "
                    f"({self.least_documents:,} are enough)"
                )
        order = torch.from_numpy(head_order(self.interactions_N, _cell_sizes(points, settings)).copy())
        return order[:head].sort().values, order[head:].sort().values

    def _count_paths(self, points: Points, counted: Tensor) -> None:
        """Count the path tables of some rows with the codebooks as they stand; nothing without SARQ."""

    def _depths(self, codes_BL: Tensor) -> Tensor:
        """Give how many codes each item keeps, (B,) int64."""
        return torch.full((len(codes_BL),), codes_BL.shape[1], device=codes_BL.device)

    def _encode(self, block_ND: Tensor) -> Tensor:
        return residual_codes(self.codebooks, block_ND)

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        return sum_codewords(self.codebooks, codes_NL)


@dataclass(frozen=True)
class SA2CRQSettings(ACRQSettings):
    """Settings of SA2CRQ.

    Attributes:
        threshold: share of the documents; a path with no more of them ends (see `models.quantizers.sarq`).
    """

    threshold: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold("sa2crq", self.threshold)


@register
class SA2CRQ(RuledQuantizer, ACRQ):
    """ACRQ with SARQ's depths, in training and after (section 2.3); kind "residual" with a length rule."""

    system = "sa2crq"
    settings_class = SA2CRQSettings

    def __init__(self, settings: SA2CRQSettings | None = None) -> None:
        self.lengths = settings or SA2CRQSettings()
        super().__init__(self.lengths)

    def _count_paths(self, points: Points, counted: Tensor) -> None:
        blocks = torch.split(counted, BLOCK_ROWS)
        codes = torch.cat([residual_codes(self.codebooks, points.take(rows)) for rows in blocks])
        share = min(self.lengths.threshold * points.rows / len(counted), 1.0)
        self._rule = path_rule(codes.cpu().numpy().astype(np.int32), self.level_sizes, share)

    def _depths(self, codes_BL: Tensor) -> Tensor:
        return (self._arrange(codes_BL) >= 0).sum(dim=1)

    def _encode(self, block_ND: Tensor) -> Tensor:
        return self._arrange(residual_codes(self.codebooks, block_ND))


def head_order(interactions_N: NDArray[np.integer[Any]] | None, density_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order documents from head to tail: most interactions, then greatest density, then position.

    Raises:
        QuantizerError: interactions of another number of documents, or that are no counts.
    """
    n = len(density_N)
    counts_N = np.zeros(n, np.int64) if interactions_N is None else interactions_N
    if counts_N.shape != (n,) or not np.issubdtype(counts_N.dtype, np.integer) or counts_N.min(initial=0) < 0:
        raise QuantizerError(
            f"interactions are {counts_N.dtype} of shape {counts_N.shape}, need {n} counts of at least 0, one each"
        )
    order: NDArray[np.int64] = np.lexsort((np.arange(n), -density_N, -counts_N))
    return order


def gather(codebooks: Sequence[Tensor], codes_BL: Tensor) -> Tensor:
    """Give the codewords of codes, (B, L, D); those of -1 mean nothing."""
    levels = zip(codebooks, codes_BL.T, strict=True)
    return torch.stack([codebook_KD[codes_B.clamp(min=0)] for codebook_KD, codes_B in levels], dim=1)


def path_loss(x_BD: Tensor, codewords_BLD: Tensor, depth_B: Tensor) -> Tensor:
    """Give the mean loss of items, each summed to its own depth (section 2.3, restated above)."""
    levels = torch.arange(codewords_BLD.shape[1], device=x_BD.device)
    kept_BLD = codewords_BLD * (levels < depth_B[:, None])[..., None]
    before_BLD = x_BD[:, None] - (kept_BLD.cumsum(dim=1) - kept_BLD).detach()
    codebook_BL = (before_BLD - codewords_BLD).square().sum(dim=2) * (levels < depth_B[:, None])
    rebuilt_B = (x_BD - kept_BLD.sum(dim=1)).square().sum(dim=1)
    return (rebuilt_B + codebook_BL.sum(dim=1)).mean()


def _train(
    quantizer: ACRQ, points: Points, rows: Tensor, frozen: Sequence[int], before_epoch: Step, after_epoch: Step
) -> None:
    """Train the quantizer's codebooks on some rows of points; the first `frozen` rows of each level do not move."""
    settings = quantizer.settings
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = [codebook.clone().requires_grad_() for codebook in quantizer.codebooks]
    quantizer.codebooks = [parameter.detach() for parameter in parameters]  # the same memory: it follows the training
    adam = torch.optim.Adam(parameters, lr=settings.learning_rate)
    for epoch in range(settings.epochs):
        before_epoch()
        adam.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for batch in torch.split(shuffled, settings.batch_size):
            x_BD = points.take(batch)
            codes_BL = residual_codes(quantizer.codebooks, x_BD)
            with torch.enable_grad():
                loss = path_loss(x_BD, gather(parameters, codes_BL), quantizer._depths(codes_BL))
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch publishes no type for it
            for parameter, anchors in zip(parameters, frozen, strict=True):
                if parameter.grad is not None:
                    parameter.grad[:anchors] = 0  # the indicator of section 2.3
            adam.step()
        after_epoch()
    quantizer.codebooks = [parameter.detach().clone() for parameter in parameters]


def _start(points: Points, head: Tensor, settings: ACRQSettings) -> tuple[list[Tensor], int]:
    """Make the anchors of all levels by k-means of the head items' residuals; also how many centres were revived."""
    residuals = Points(points.take(_sample(head, settings.seed)), points.device)
    codebooks, revived = [], 0
    for level, codes in enumerate(settings.anchors):
        found = kmeans(residuals, codes, _kmeans_settings(settings, level))
        residuals = residuals.through(without_nearest(found.centres))
        codebooks.append(found.centres)
        revived += found.revived
    return codebooks, revived


def _extend(
    points: Points, tail: Tensor, anchors: Sequence[Tensor], settings: ACRQSettings
) -> tuple[list[Tensor], int]:
    """Add rows to the anchors: centres of that half of the tail's residuals which the anchors serve worst."""
    residual_ND = points.take(_sample(tail, settings.seed))
    codebooks, revived = [], 0
    for level, (anchors_AD, size) in enumerate(zip(anchors, settings.level_sizes, strict=True)):
        _, gain_N = nearest(residual_ND, anchors_AD, spherical=False)
        added = size - len(anchors_AD)
        worst = gain_N.topk(max(added, len(gain_N) // 2), largest=False).indices
        found = kmeans(Points(residual_ND[worst], points.device), added, _kmeans_settings(settings, level))
        codebooks.append(torch.cat([anchors_AD, found.centres]))
        residual_ND = without_nearest(codebooks[-1])(residual_ND)
        revived += found.revived
    return codebooks, revived


def _cell_sizes(points: Points, settings: ACRQSettings) -> NDArray[np.int64]:
    """Give every document the size of its cell among A_1 cells."""
    centres = kmeans(points, settings.anchors[0], _kmeans_settings(settings, 0)).centres
    cells = torch.cat([nearest(block, centres, spherical=False)[0].cpu() for _, block in points.blocks()])
    sizes: NDArray[np.int64] = torch.bincount(cells)[cells].numpy()
    return sizes


def _kmeans_settings(settings: ACRQSettings, level: int) -> KMeansSettings:
    return KMeansSettings(iterations=settings.kmeans_iterations, seed=settings.seed + level)


def _sample(rows: Tensor, seed: int) -> Tensor:
    if len(rows) <= START_ROWS:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:START_ROWS]]
