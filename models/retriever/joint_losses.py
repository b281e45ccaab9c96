"""The losses of DGI's joint training, one function an equation (Differentiable Geometric Indexing, eq. 16-20).

Legend: B pairs of a batch, G documents of a batch, L levels, K codes of a level, D vector dimensions. InfoNCE (eq. 19)
is `models.retriever.objectives.contrast`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

TINY = 1e-9  # ε of eq. 20


def next_token_loss(
    hidden_BLD: Tensor, heads: Sequence[Tensor], scale_L: Tensor, codes_BL: Tensor, unit_heads: bool = True
) -> Tensor:
    """Cross-entropy of the codes over each level's whole codebook, summed over levels, mean over pairs (eq. 10, 16).

    Args:
        hidden_BLD: unit hidden states before each code.
        heads: one (K, D) tensor a level; the codebooks themselves where weights are shared (eq. 9).
        scale_L: γ of each level (eq. 13).
        codes_BL: the documents' codes.
        unit_heads: scaled cosine (eq. 13); without, rows keep their length in the product (ablation).
    """
    losses = []
    for level, head_KD in enumerate(heads):
        rows_KD = F.normalize(head_KD, dim=-1) if unit_heads else head_KD
        logits_BK = scale_L[level] * (hidden_BLD[:, level].float() @ rows_KD.T)
        losses.append(F.cross_entropy(logits_BK, codes_BL[:, level]))
    return torch.stack(losses).sum()


def global_loss(x_GD: Tensor, vectors_GLD: Tensor) -> Tensor:
    """1 − cosine between vectors and the sums of their soft codewords, mean over documents (eq. 17)."""
    return (1 - F.cosine_similarity(x_GD, vectors_GLD.sum(dim=1), dim=-1)).mean()


def local_loss(residuals_GLD: Tensor, codebooks: Sequence[Tensor], codes_GL: Tensor, beta: float) -> Tensor:
    """Draw chosen codewords to residuals and, weighted by β, residuals to codewords (eq. 18)."""
    loss = residuals_GLD.new_zeros(())
    for level, codebook_KD in enumerate(codebooks):
        residual_GD, word_GD = residuals_GLD[:, level], codebook_KD[codes_GL[:, level]]
        pulled_G = (residual_GD.detach() - word_GD).square().sum(dim=1)
        committed_G = (residual_GD - word_GD.detach()).square().sum(dim=1)
        loss = loss + (pulled_G + beta * committed_G).mean()
    return loss


def diversity_loss(weights: Sequence[Tensor]) -> Tensor:
    """Minus the entropy of the batch's mean use of codes, summed over levels (eq. 20); weights are (G, K) a level."""
    use = [weight_GK.mean(dim=0) for weight_GK in weights]
    return torch.stack([(use_K * (use_K + TINY).log()).sum() for use_K in use]).sum()
