"""The losses of QAMA, one function for each equation; section 3.4 of the paper.

Shapes: Q queries (rows of a similarity matrix), N documents (its columns), B vectors, D dimensions, T thresholds.

A similarity matrix compares a batch's queries with its documents. The paper compares a batch with itself; both are the
same function here. Sums over pairs or rows of a batch are written as means, so that a weight does not depend on the
size of a batch; sums over dimensions and levels are sums, as printed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the usual name)

MIN_RAMP = 0.2  # what eq. 17 and 18 start from


def cosines(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Cosine of every pair (eq. 10), (Q, N)."""
    return F.normalize(queries_QD, dim=1) @ F.normalize(documents_ND, dim=1).T


def similarity_mse(teacher_QN: Tensor, student_QN: Tensor) -> Tensor:
    """Squared difference of similarities (eq. 9), mean over pairs."""
    return (teacher_QN - student_QN).square().mean()


def symmetric_kl(teacher_QN: Tensor, student_QN: Tensor, temperature: float) -> Tensor:
    """Symmetric Kullback-Leibler divergence of the rows' softmax (eq. 11-12), mean over rows."""
    log_p = F.log_softmax(teacher_QN / temperature, dim=1)
    log_q = F.log_softmax(student_QN / temperature, dim=1)
    difference = log_p - log_q
    return 0.5 * ((log_p.exp() - log_q.exp()) * difference).sum(dim=1).mean()


def rank_disagreement(
    teacher_QN: Tensor, student_QN: Tensor, sharpness: float, offsets: Tensor | None = None
) -> Tensor:
    """Share of column pairs (j, k) of a row that teacher and student order differently, softly (eq. 13).

    Eq. 13 prints Σ σ(a_jk) σ(b_jk), which grows with agreement. A loss has to fall with it: as (j, k) and (k, j) are
    both in the sum, the mean of twice the product is the share that agrees, and this gives 1 minus it.

    Args:
        teacher_QN: similarities of the original vectors.
        student_QN: similarities of the codes or prefixes.
        sharpness: t.
        offsets: compare column j with (j + offset) mod N for these offsets only; None takes all N - 1 (the full sum).
    """
    columns = teacher_QN.shape[1]
    if offsets is None:
        offsets = torch.arange(1, columns, device=teacher_QN.device)
    # agreement of the pair in both orders, so that any set of offsets is symmetric
    others = (torch.arange(columns, device=offsets.device) + offsets[:, None]) % columns
    a = torch.sigmoid((teacher_QN[:, None, :] - teacher_QN[:, others]) * sharpness)
    b = torch.sigmoid((student_QN[:, None, :] - student_QN[:, others]) * sharpness)
    return (a + b - 2 * a * b).mean()


def contrastive(student_QN: Tensor, positives_Q: Tensor, temperature: float, others_QN: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row's positive column against the negatives (eq. 14), mean over rows.

    Args:
        student_QN: similarities of the codes or prefixes.
        positives_Q: column of each row's own document.
        temperature: τ.
        others_QN: bool; columns that are relevant to a row as well. They are left out of its denominator, so that they
            are not pushed away. The paper does not say what becomes of them; this is ours. None: there are none.
    """
    if others_QN is not None:
        student_QN = student_QN.masked_fill(others_QN, -torch.inf)
    return F.cross_entropy(student_QN / temperature, positives_Q)


def information_bottleneck(values_BD: Tensor, threshold: float = 0.1, power: float = 0.3) -> Tensor:
    """Push later dimensions toward zero (eq. 15), mean over vectors; w_i = i / D with i from 1."""
    size = values_BD.abs()
    dims = values_BD.shape[1]
    weights_D = torch.arange(1, dims + 1, dtype=values_BD.dtype, device=values_BD.device) / dims
    # u^0.3 has no finite slope at 0: the floor keeps the gradient finite and changes the loss by less than 1e-3
    ratio = (size.square() / (threshold + size)).clamp_min(1e-10)
    return (weights_D * ratio.pow(power)).sum(dim=1).mean()


def level_orthogonality(values_BD: Tensor, prefixes: tuple[int, ...], level: int) -> Tensor:
    """The terms of eq. 16 for one level l: Σ_{j<l} ‖Δ_lᵀ · normalize(E_j)‖_F, divided by the vectors of the batch.

    Δ_l are the dimensions that prefix l adds, E_j the first prefixes[j] dimensions with rows of unit length.

    Args:
        values_BD: adapted vectors.
        prefixes: ascending dimensions.
        level: index of l in `prefixes`; level 0 adds nothing.
    """
    if level == 0:
        return values_BD.new_zeros(())
    added = values_BD[:, prefixes[level - 1] : prefixes[level]]
    terms = [torch.linalg.matrix_norm(added.T @ F.normalize(values_BD[:, :d], dim=1)) for d in prefixes[:level]]
    return torch.stack(terms).sum() / len(values_BD)


def variance_ramp(progress: float) -> float:
    """Weight of eq. 17 at progress t/T: max(0.2, (e^{t/T} - 1) / (e - 1))."""
    return max(MIN_RAMP, math.expm1(progress) / math.expm1(1))


def variance_control(values_BD: Tensor, progress: float) -> Tensor:
    """Adaptive variance control (eq. 17): ramp · Σ_d exp(-σ_d), σ over the batch (divided by B - 1)."""
    return variance_ramp(progress) * torch.exp(-values_BD.std(dim=0)).sum()


def quantization_ramp(progress: float) -> float:
    """w(t) of eq. 18: from 0.2 to 1 over training, linearly."""
    return MIN_RAMP + (1 - MIN_RAMP) * progress


def range_penalty(values_BD: Tensor, lower: float, upper: float) -> Tensor:
    """Squared excess over [lower, upper] of every value (eq. 19), (B, D)."""
    return F.relu(lower - values_BD).square() + F.relu(values_BD - upper).square()


def quantization(
    values_BD: Tensor,
    thresholds_TD: Tensor,
    progress: float,
    *,
    lower: float,
    upper: float,
    range_weight: float,
) -> Tensor:
    """Keep values off the nearest threshold and inside the range (eq. 18), mean over values."""
    nearest = (values_BD[:, None, :] - thresholds_TD).abs().amin(dim=1)
    inside = range_weight * range_penalty(values_BD, lower, upper)
    return quantization_ramp(progress) * (torch.exp(-nearest) + inside).mean()
