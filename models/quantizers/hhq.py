"""HHQ: Hyperspherical Householder Quantization, complete (Distilling Large Embeddings via HHQ, eq. 1-7).

Shapes: N documents, D dimensions, K codes of a level, L levels, B rows of a batch.

Level 1 picks the codeword of greatest cosine (eq. 2). Every further level picks the reflection that brings the
approximation closest to the vector (eq. 3-5):

    ⟨H(x̂; v), x⟩ = ⟨x̂, x⟩ − 2 ⟨x̂, v⟩⟨x, v⟩        so   code = argmax_k −2 (x̂·V)_k (x·V)_k

which is two matrix products for all codes of all rows. The choice is hard; gradients of eq. 7 reach every codebook
through the chain of reflections.

Beyond the paper, each switchable: dead codes are revived between epochs (the paper names collapse as a limit), the
learning rate falls to zero on a cosine, and neighbours are kept apart (`separation`). `paper_settings()` gives the
version without revival and separation, `hhq_paper` of `rhumb quantize`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress
from torch import Tensor

from models.quantizers.base import FitReport, Quantizer, QuantizerSettings, mean_cosine, register
from models.quantizers.kmeans import KMeansSettings, kmeans, nearest
from models.quantizers.points import Points, unit, unit_or_random
from models.quantizers.separation import Separation
from models.quantizers.settings import check_least, check_positive
from service.model.quantizer import NEGLIGIBLE


@dataclass(frozen=True)
class HHQSettings(QuantizerSettings):
    """Settings of HHQ.

    Attributes:
        kmeans_iterations: upper bound of k-means iterations a level at the start (section 3.2).
        epochs: passes of the joint training (eq. 7); 0 leaves the hierarchical start as it is.
        batch_size: rows of a step.
        learning_rate: of Adam, in units of a unit vector's coordinates.
        decay: the learning rate falls to zero on a half cosine (the paper gives neither rate nor schedule).
        revive: codes that no document chose in an epoch move to the documents that are served worst.
        separation: weight of the term that tells neighbours apart (see `models.quantizers.separation`); 0 without.
    """

    kmeans_iterations: int = 25
    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 0.007
    decay: bool = True
    revive: bool = True
    separation: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("hhq", self, kmeans_iterations=1, epochs=0, batch_size=1, separation=0)
        if self.epochs:
            check_positive("hhq", self, "learning_rate")


def paper_settings(settings: HHQSettings) -> HHQSettings:
    """Give the same settings without revival and separation; some schedule a learning rate must have."""
    return replace(settings, revive=False, separation=0.0)


@register
class HHQ(Quantizer):
    """Hyperspherical Householder quantizer; kind "householder"."""

    system = "hhq"
    kind = "householder"
    settings_class = HHQSettings

    def __init__(self, settings: HHQSettings | None = None) -> None:
        super().__init__(settings)
        self.settings = settings or HHQSettings()

    def _fit(self, points: Points, bar: Progress) -> FitReport:
        start = bar.add_task("hhq start", total=len(self.level_sizes))
        self.codebooks = []
        for level, codes in enumerate(self.level_sizes):
            self.codebooks.append(self._start_level(points, level, codes))
            bar.advance(start)
        objective, revived = [mean_cosine(self, points)], 0
        if self.settings.epochs:
            trained, revived = _Trainer(self, points).run(bar)
            objective += trained
        return FitReport(tuple(objective), revived)

    def _start_level(self, points: Points, level: int, codes: int) -> Tensor:
        """Cluster the vectors (level 0) or the directions from the approximation to the vector (eq. 6)."""
        seed = self.settings.seed + level
        if level == 0:
            targets = points
        else:
            left = points.through(lambda block: block - self._approximate(block))
            targets = left.longer_than(NEGLIGIBLE, codes).through(unit)
        settings = KMeansSettings(spherical=True, iterations=self.settings.kmeans_iterations, seed=seed)
        centres_KD = kmeans(targets, codes, settings).centres
        return unit_or_random(centres_KD, seed)

    def _approximate(self, block_BD: Tensor) -> Tensor:
        return apply_codes(self.codebooks, encode_greedy(self.codebooks, block_BD))

    def _encode(self, block_ND: Tensor) -> Tensor:
        return encode_greedy(self.codebooks, block_ND)

    def _reconstruct(self, codes_NL: Tensor) -> Tensor:
        return apply_codes(self.codebooks, codes_NL)


def householder(z_BD: Tensor, v_BD: Tensor) -> Tensor:
    """Reflect z across the hyperplane orthogonal to the unit vector v (eq. 3); keeps the length of z."""
    return z_BD - 2 * (z_BD * v_BD).sum(dim=-1, keepdim=True) * v_BD


def residual_directions(x_BD: Tensor, approximation_BD: Tensor) -> Tensor:
    """Give (x − x̂)/|x − x̂| (eq. 6), the one reflection that would finish; zero where nothing is left over."""
    return unit(x_BD - approximation_BD)


def encode_greedy(codebooks: list[Tensor], x_BD: Tensor) -> Tensor:
    """Choose codes level by level (eq. 2, 4, 5).

    Args:
        codebooks: one (K, D) tensor of unit rows a level; may be fewer levels than trained.
        x_BD: unit vectors.

    Returns:
        (B, levels) int64 codes.
    """
    first_B, _ = nearest(x_BD, codebooks[0], spherical=True)
    codes, approximation_BD = [first_B], codebooks[0][first_B]
    for codebook_KD in codebooks[1:]:
        # −2 is left out of the product and argmax becomes argmin
        chosen_B = ((approximation_BD @ codebook_KD.T) * (x_BD @ codebook_KD.T)).argmin(dim=1)
        approximation_BD = householder(approximation_BD, codebook_KD[chosen_B])
        codes.append(chosen_B)
    return torch.stack(codes, dim=1)


def apply_codes(codebooks: list[Tensor], codes_BL: Tensor) -> Tensor:
    """Follow the reflections of given codes (eq. 5), differentiable in the codebooks.

    A code of -1 leaves its level out; without a first code there is no starting point and the row is zero.

    Args:
        codebooks: one (K, D) tensor a level.
        codes_BL: (B, levels) int64.

    Returns:
        (B, D) approximations, unit length.
    """
    approximation_BD = _rows(codebooks[0], codes_BL[:, 0])
    for codebook_KD, codes_B in zip(codebooks[1:], codes_BL.T[1:], strict=False):
        approximation_BD = householder(approximation_BD, _rows(codebook_KD, codes_B))
    return approximation_BD


def _rows(codebook_KD: Tensor, codes_B: Tensor) -> Tensor:
    return codebook_KD[codes_B.clamp(min=0)] * (codes_B >= 0)[:, None]


class _Trainer:
    """Joint training of all codebooks by 1 − mean cosine (eq. 7); writes its result into the quantizer."""

    def __init__(self, quantizer: HHQ, points: Points) -> None:
        self._quantizer, self._points, self._settings = quantizer, points, quantizer.settings
        self._generator = torch.Generator().manual_seed(quantizer.settings.seed)
        self._parameters = [codebook.clone().requires_grad_() for codebook in quantizer.codebooks]
        self._adam = torch.optim.Adam(self._parameters, lr=quantizer.settings.learning_rate)
        self._separation = Separation(points, quantizer.settings.batch_size, self._generator)
        self._revived = 0

    def run(self, bar: Progress) -> tuple[list[float], int]:
        objective = []
        task = bar.add_task("hhq train", total=self._settings.epochs)
        for epoch in range(self._settings.epochs):
            self._set_learning_rate(epoch)
            objective.append(self._epoch(last=epoch == self._settings.epochs - 1))
            bar.update(task, advance=1, description=f"hhq train (cosine {objective[-1]:.4f})")
        self._quantizer.codebooks = [parameter.detach().clone() for parameter in self._parameters]
        return objective, self._revived

    def _epoch(self, last: bool) -> float:
        used = [torch.zeros(len(p), dtype=torch.bool, device=p.device) for p in self._parameters]
        total = 0.0
        worst: tuple[float, Tensor] = (math.inf, torch.empty(0))
        if self._settings.separation and len(self._parameters) > 1:
            codes = [encode_greedy(self._parameters[:-1], block) for _, block in self._points.blocks()]
            self._separation.start_epoch(torch.cat(codes))
        shuffled = torch.randperm(self._points.rows, generator=self._generator)
        for rows in torch.split(shuffled, self._settings.batch_size):
            x_BD = self._points.take(rows)
            codes_BL = encode_greedy(self._parameters, x_BD)
            cosine_B = self._step(x_BD, codes_BL)
            total += float(cosine_B.double().sum())
            for level_used, codes_B in zip(used, codes_BL.T, strict=True):
                level_used[codes_B] = True
            if float(cosine_B.mean()) < worst[0]:
                worst = (float(cosine_B.mean()), x_BD)
        if self._settings.revive and not last:  # what is revived needs an epoch to settle
            self._revive(used, worst[1])
        return total / self._points.rows

    def _step(self, x_BD: Tensor, codes_BL: Tensor) -> Tensor:
        with torch.enable_grad():
            codebooks = [unit(parameter) for parameter in self._parameters]  # gradients stay tangent to the sphere
            cosine_B = (apply_codes(codebooks, codes_BL) * x_BD).sum(dim=1)
            loss = 1 - cosine_B.mean() + self._apart(codebooks)
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch publishes no type for it
        self._adam.step()
        for parameter in self._parameters:
            parameter.copy_(unit(parameter))
        return cosine_B.detach()

    def _apart(self, codebooks: list[Tensor]) -> Tensor | float:
        """The weighted loss of the next cells; nothing where every document is alone in its cell."""
        if not self._settings.separation or len(codebooks) == 1:
            return 0.0
        x_CD, prefixes_CL, cell_C = self._separation.next_cells()
        if not len(x_CD):
            return 0.0
        approximation_CD = apply_codes(codebooks[:-1], prefixes_CL)
        return self._settings.separation * Separation.loss(approximation_CD, x_CD, codebooks[-1], cell_C)

    def _revive(self, used: list[Tensor], x_BD: Tensor) -> None:
        """Move the unused codes of every level to what the worst rows of a batch lack at that level."""
        for level, level_used in enumerate(used):
            dead = torch.nonzero(~level_used)[:, 0][: len(x_BD)]
            if not len(dead):
                continue
            targets_BD = x_BD
            if level:
                before = self._parameters[:level]
                targets_BD = residual_directions(x_BD, apply_codes(before, encode_greedy(before, x_BD)))
            final_BD = apply_codes(self._parameters, encode_greedy(self._parameters, x_BD))
            worst = torch.argsort((final_BD * x_BD).sum(dim=1))[: len(dead)]
            self._parameters[level][dead] = unit_or_random(targets_BD[worst], self._settings.seed)
            self._forget(level, dead)
            self._revived += len(dead)

    def _forget(self, level: int, rows: Tensor) -> None:
        state = self._adam.state[self._parameters[level]]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment][rows] = 0

    def _set_learning_rate(self, epoch: int) -> None:
        if self._settings.decay:
            progress = epoch / self._settings.epochs
            for group in self._adam.param_groups:
                group["lr"] = self._settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
