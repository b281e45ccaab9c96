"""The differentiable quantizer of DGI (Differentiable Geometric Indexing, section 4.1, eq. 6-8 and 13).

Shapes: G documents of a batch, N documents, D dimensions, K codes of a level, L levels.

A level scores its codewords by scaled cosine with the residual. In training it answers with a mixture of codewords, its
weights drawn by Gumbel-softmax (Jang et al. 2016), so gradients pass; serving takes the code of greatest cosine:

    s_k = γ cos(r, e_k),   p = softmax((s + Gumbel noise) / τ),   z̃ = Σ_k p_k e_k,   r ← r − z̃

`Gumbel` is the k-means start (section 5.1.4) and the hard half; the joint training in `models.retriever.joint` moves
its codebooks. Codewords keep their length: directions are what cosines compare, lengths are what residuals lose.

Without `scaled_cosine` (the ablation of table 3) codes are what residual quantization usually takes, the nearest
codeword, s_k = γ (r·e_k − |e_k|²/2), and the kind is "residual": the length of a codeword matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import (
    FitReport,
    Quantizer,
    QuantizerSettings,
    QuantizerState,
    mean_cosine,
    register,
)
from models.quantizers.kmeans import KMeansSettings, kmeans, nearest
from models.quantizers.points import Points, unit, unit_or_random
from models.quantizers.residual import sum_codewords
from models.quantizers.settings import check_least
from service.model.quantizer import NEGLIGIBLE

KINDS = {True: "residual_cosine", False: "residual"}  # by scaled_cosine


@dataclass(frozen=True)
class GumbelSettings(QuantizerSettings):
    """Settings of DGI's quantizer; the paper: level_sizes 4096, 1024, 256.

    Attributes:
        scaled_cosine: compare directions; without, codes are the nearest codewords (ablation of table 3).
        kmeans_iterations: upper bound of k-means iterations a level at the start.
    """

    level_sizes: tuple[int, ...] = (256, 128, 64)
    scaled_cosine: bool = True
    kmeans_iterations: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("dgi", self, kmeans_iterations=1)


@register
class Gumbel(Quantizer):
    """DGI's codebooks, hard: kind "residual_cosine", or "residual" without scaled cosine."""

    system = "dgi"
    kind = "residual_cosine"
    settings_class = GumbelSettings

    def __init__(self, settings: GumbelSettings | None = None) -> None:
        super().__init__(settings)
        self.settings = settings or GumbelSettings()

    def state(self) -> QuantizerState:
        """Give what a model stores; its kind follows `scaled_cosine`."""
        return super().state()._replace(kind=KINDS[self.settings.scaled_cosine])

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        task = bar.add_task("dgi start", total=len(self.level_sizes))
        self.codebooks, revived, residuals = [], 0, points
        for level, codes in enumerate(self.level_sizes):
            codebook_KD, moved = self._start_level(residuals, codes, self.settings.seed + level)
            self.codebooks.append(codebook_KD)
            residuals = residuals.through(lambda block, book=codebook_KD: block - book[self._nearest(block, book)])  # type: ignore[misc]  # default binds the loop variable
            revived += moved
            bar.advance(task)
        return FitReport((mean_cosine(self, points),), revived)

    def _start_level(self, residuals: Points, codes: int, seed: int) -> tuple[Tensor, int]:
        """K-means of residuals; under scaled cosine of their directions, each centre as long as fits its residuals."""
        spherical = self.settings.scaled_cosine
        residuals = residuals.longer_than(NEGLIGIBLE, codes) if spherical else residuals
        targets = residuals.through(unit) if spherical else residuals
        settings = KMeansSettings(spherical=spherical, iterations=self.settings.kmeans_iterations, seed=seed)
        found = kmeans(targets, codes, settings)
        if not spherical:
            return found.centres, found.revived
        centres_KD = unit_or_random(found.centres, seed)
        length_K, hits_K = torch.zeros(codes, device=centres_KD.device), torch.zeros(codes, device=centres_KD.device)
        for _, block in residuals.blocks():
            chosen, along = nearest(block, centres_KD, spherical=True)
            length_K.index_add_(0, chosen, along)
            hits_K.index_add_(0, chosen, torch.ones_like(along))
        mean = float(length_K.sum() / hits_K.sum())  # the length of a codeword that nothing chose
        length_K = torch.where(hits_K > 0, length_K / hits_K.clamp(min=1), torch.full_like(length_K, mean))
        return centres_KD * length_K.clamp(min=1e-4)[:, None], found.revived

    def _nearest(self, residual_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        return code_scores(residual_ND, codebook_KD, self.settings.scaled_cosine).argmax(dim=1)

    def _encode(self, block_ND: Tensor) -> Tensor:
        return hard_codes(self.codebooks, block_ND, self.settings.scaled_cosine)

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        return sum_codewords(self.codebooks, codes_NL)


@dataclass(frozen=True)
class SoftPath:
    """What the levels answer to a batch of documents, differentiable in vectors and codebooks.

    Attributes:
        weights: one (G, K) tensor a level: p of eq. 6; rows sum to one.
        vectors_GLD: z̃ of eq. 7.
        residuals_GLD: what each level was given: r_0 … r_{L−1}.
        codes_GL: the code of greatest score at each level, without noise.
    """

    weights: list[Tensor]
    vectors_GLD: Tensor
    residuals_GLD: Tensor
    codes_GL: Tensor


def code_scores(residual_GD: Tensor, codebook_KD: Tensor, scaled_cosine: bool) -> Tensor:
    """Score codewords (G, K): cosine, or r·e − |e|²/2, whose greatest is the nearest codeword.

    A residual that is rounding has a cosine of zero with all, as in the service: its first code is the first.
    """
    if scaled_cosine:
        is_rounding_G1 = torch.linalg.vector_norm(residual_GD, dim=1, keepdim=True) < NEGLIGIBLE
        scores_GK: Tensor = unit(residual_GD.masked_fill(is_rounding_G1, 0.0)) @ unit(codebook_KD).T
        return scores_GK
    return residual_GD @ codebook_KD.T - codebook_KD.square().sum(dim=1) / 2


def hard_codes(codebooks: Sequence[Tensor], x_GD: Tensor, scaled_cosine: bool) -> Tensor:
    """Choose codes as serving does: greatest score, then subtract the codeword; (G, L) int64."""
    codes, residual_GD = [], x_GD
    for codebook_KD in codebooks:
        codes.append(code_scores(residual_GD, codebook_KD, scaled_cosine).argmax(dim=1))
        residual_GD = residual_GD - codebook_KD[codes[-1]]
    return torch.stack(codes, dim=1)


def soft_path(
    codebooks: Sequence[Tensor], x_GD: Tensor, scale_L: Tensor, temperature: float, scaled_cosine: bool = True
) -> SoftPath:
    """Quantize by Gumbel-softmax (eq. 6 and 7); noise comes from torch's global generator.

    Args:
        codebooks: one (K, D) tensor a level.
        x_GD: vectors.
        scale_L: γ of each level.
        temperature: τ of eq. 6.
        scaled_cosine: see `code_scores`.
    """
    weights, vectors, residuals, codes, residual_GD = [], [], [], [], x_GD
    for level, codebook_KD in enumerate(codebooks):
        scores_GK = scale_L[level] * code_scores(residual_GD, codebook_KD, scaled_cosine)
        weights.append(torch.softmax((scores_GK + gumbel_noise(scores_GK)) / temperature, dim=1))
        vectors.append(weights[-1] @ codebook_KD)
        residuals.append(residual_GD)
        codes.append(scores_GK.argmax(dim=1))
        residual_GD = residual_GD - vectors[-1]
    return SoftPath(weights, torch.stack(vectors, 1), torch.stack(residuals, 1), torch.stack(codes, 1))


def straight_through_path(
    codebooks: Sequence[Tensor], x_GD: Tensor, scale_L: Tensor, scaled_cosine: bool = True
) -> SoftPath:
    """The same with hard codes and the straight-through estimator (Bengio et al. 2013), the ablation of table 3.

    Forward every level gives its codeword; backward the gradient is copied to the residual before it, and none reaches
    the codebook. Weights are the softmax of the scores without noise, for the code-use entropy only.
    """
    weights, vectors, residuals, codes, residual_GD = [], [], [], [], x_GD
    for level, codebook_KD in enumerate(codebooks):
        scores_GK = scale_L[level] * code_scores(residual_GD, codebook_KD, scaled_cosine)
        weights.append(torch.softmax(scores_GK, dim=1))
        codes.append(scores_GK.argmax(dim=1))
        word_GD = codebook_KD[codes[-1]]
        vectors.append(residual_GD + (word_GD - residual_GD).detach())
        residuals.append(residual_GD)
        residual_GD = residual_GD - word_GD.detach()
    return SoftPath(weights, torch.stack(vectors, 1), torch.stack(residuals, 1), torch.stack(codes, 1))


def gumbel_noise(like: Tensor) -> Tensor:
    """Draw Gumbel(0, 1) noise of a tensor's shape."""
    return -torch.empty_like(like).exponential_().log()


def annealed(start: float, end: float, share: float) -> float:
    """Fall exponentially from `start` to `end` as `share` of the training goes from 0 to 1 (section 5.1.4)."""
    return float(start * (end / start) ** min(max(share, 0.0), 1.0))
