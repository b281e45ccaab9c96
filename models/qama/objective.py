"""The whole objective (eq. 8): every loss, at every prefix, with its weight.

Shapes: Q queries, N documents, D dimensions; teacher = cosines of the original vectors.

Similarity losses (eq. 9-14) compare the teacher with the float prefix and, with `straight_through`, with the codes of
every level at that prefix. Hamming similarities spread less than cosines do, so a code's matrix is stretched to the
teacher's mean and standard deviation first (constants to the gradient). Regularisers (eq. 15-18) act on ẑ.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from models.qama import losses
from models.qama.batches import Batch
from models.qama.network import Adapter, prefix_slices
from models.qama.recipe import LOSSES, AdapterRecipe
from models.qama.thresholds import Thresholds, code_similarities
from service.model.layout import PlainLevel, code_layout


class Objective(nn.Module):
    """Adapter, thresholds and their loss.

    Args:
        recipe: weights and constants.
    """

    def __init__(self, recipe: AdapterRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        quantisation = recipe.quantisation
        self.prefixes = recipe.network.prefixes
        self.adapter = Adapter(recipe.network)
        self.thresholds = Thresholds(
            list(quantisation.levels), self.prefixes, quantisation.pair_hidden, quantisation.momentum
        )

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Give the loss of a batch and its parts by name; thresholds follow the batch first (eq. 2).

        Args:
            batch: vectors.
            step: t of eq. 17 and 18, which also says whose turn it is among the levels.
        """
        queries, documents = torch.from_numpy(batch.queries_QD), torch.from_numpy(batch.documents_ND)
        teacher_QN = queries @ documents.T
        both = self.adapter(torch.cat([queries, documents]))
        adapted = (both[: len(queries)], both[len(queries) :])
        self.thresholds.update(both if self.recipe.quantisation.thresholds_from == "both" else adapted[1])
        parts = dict.fromkeys(LOSSES, both.new_zeros(()))
        for share, similarities in self._representations(adapted, teacher_QN, step):
            for prefix, student_QN in enumerate(similarities):
                self._add_similarity(parts, share, prefix, teacher_QN, student_QN, batch)
        self._add_regularisers(parts, both, step / max(1, self.recipe.train.steps))
        total = torch.stack(list(parts.values())).sum()
        return total, {name: float(part.detach()) for name, part in parts.items()}

    def _representations(
        self, adapted: tuple[Tensor, Tensor], teacher_QN: Tensor, step: int
    ) -> list[tuple[float, list[Tensor]]]:
        """(weight, similarity matrix of every prefix) of the float prefixes and of the codes of this step's levels."""
        slices = [prefix_slices(part, self.prefixes) for part in adapted]
        floats = [losses.cosines(q, n) for q, n in zip(*slices, strict=True)]
        found = [(self.recipe.quantisation.float_weight, floats)]
        turn = self.levels_of(step)
        plain: dict[PlainLevel, None] = {
            run.level: None for level in turn for block in code_layout(level, self.prefixes).blocks() for run in block
        }
        sharpness = self.recipe.quantisation.sharpness
        signs_q, signs_n = ({x: self.thresholds.signs(part, x, sharpness) for x in plain} for part in adapted)
        for level, share in turn.items():
            codes = code_similarities(signs_q, signs_n, level, self.prefixes)
            found.append((share, [stretch(student, teacher_QN) for student in codes]))
        return found

    def levels_of(self, step: int) -> dict[str, float]:
        """Levels whose codes a step sees, and their weights; none without `straight_through`."""
        quantisation = self.recipe.quantisation
        used = [(level, share) for level, share in quantisation.levels.items() if share]
        count = min(quantisation.levels_per_step or len(used), len(used)) if quantisation.straight_through else 0
        turn = [used[(step * count + i) % len(used)] for i in range(count)]
        return {level: share * len(used) / count for level, share in turn}

    def _add_similarity(
        self, parts: dict[str, Tensor], share: float, prefix: int, teacher: Tensor, student: Tensor, batch: Batch
    ) -> None:
        c = self.recipe.constants
        weights = {name: share * self.recipe.weight(name, prefix) for name in LOSSES}
        if weights["similarity"]:
            parts["similarity"] = parts["similarity"] + weights["similarity"] * losses.similarity_mse(teacher, student)
        if weights["kl"]:
            parts["kl"] = parts["kl"] + weights["kl"] * losses.symmetric_kl(teacher, student, c.temperature)
        if weights["rank"]:
            offsets = rank_offsets(teacher.shape[1], c.rank_offsets)
            rank = losses.rank_disagreement(teacher, student, c.rank_sharpness, offsets)
            parts["rank"] = parts["rank"] + weights["rank"] * rank
        if weights["contrast"]:
            positives, others = torch.from_numpy(batch.positives_Q), torch.from_numpy(batch.others_QN)
            contrast = losses.contrastive(student, positives, c.contrast_temperature, others)
            parts["contrast"] = parts["contrast"] + weights["contrast"] * contrast

    def _add_regularisers(self, parts: dict[str, Tensor], both_BD: Tensor, progress: float) -> None:
        c = self.recipe.constants
        scale = both_BD.shape[1] ** 0.5 if c.value_scale == "root_d" else 1.0
        for prefix, values in enumerate(prefix_slices(both_BD, self.prefixes)):
            weight = {name: self.recipe.weight(name, prefix) for name in LOSSES}
            scaled = values * scale
            if weight["bottleneck"]:
                loss = losses.information_bottleneck(scaled, c.bottleneck_threshold, c.bottleneck_power)
                parts["bottleneck"] = parts["bottleneck"] + weight["bottleneck"] * loss
            if weight["orthogonality"]:
                loss = losses.level_orthogonality(both_BD, self.prefixes, prefix)
                parts["orthogonality"] = parts["orthogonality"] + weight["orthogonality"] * loss
            if weight["variance"]:
                parts["variance"] = parts["variance"] + weight["variance"] * losses.variance_control(scaled, progress)
            if weight["quantization"]:
                loss = self._quantization(values, scale, progress)
                parts["quantization"] = parts["quantization"] + weight["quantization"] * loss

    def _quantization(self, values_BD: Tensor, scale: float, progress: float) -> Tensor:
        """Eq. 18 for every plain level that quantises single dimensions, their mean."""
        c = self.recipe.constants
        terms = [
            losses.quantization(
                values_BD * scale,
                self.thresholds.of(level)[:, : values_BD.shape[1]] * scale,
                progress,
                lower=c.range_lower,
                upper=c.range_upper,
                range_weight=c.range_weight,
            )
            for level in self.thresholds.levels
            if level != "0.5"
        ]
        return torch.stack(terms).mean()


def stretch(student_QN: Tensor, teacher_QN: Tensor) -> Tensor:
    """Shift and scale a similarity matrix to the teacher's mean and standard deviation; no gradient through either."""
    with torch.no_grad():
        scale = teacher_QN.std() / student_QN.std().clamp_min(1e-6)
        centre = student_QN.mean()
    return (student_QN - centre) * scale + teacher_QN.mean()


def rank_offsets(columns: int, count: int) -> Tensor:
    """At most `count` offsets 1..columns-1, evenly spread: the pairs that eq. 13 is estimated from."""
    return torch.from_numpy(np.unique(np.linspace(1, columns - 1, min(count, columns - 1)).astype(np.int64)))
