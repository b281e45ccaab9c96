"""What residual quantizers share: the nearest codeword of what is left, level by level, and the sum of the chosen ones.

Shapes: N rows, D dimensions, K codes of a level, L levels. The service does the same in `service.model.quantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.quantizers.kmeans import nearest
from models.quantizers.points import Transform


def residual_codes(codebooks: Sequence[Tensor], x_ND: Tensor) -> Tensor:
    """Choose the codeword nearest to what is left at every level, (N, L) int64; a level subtracts its codeword."""
    codes, residual_ND = [], x_ND
    for codebook_KD in codebooks:
        chosen_N, _ = nearest(residual_ND, codebook_KD, spherical=False)
        residual_ND = residual_ND - codebook_KD[chosen_N]
        codes.append(chosen_N)
    return torch.stack(codes, dim=1)


def sum_codewords(codebooks: Sequence[Tensor], codes_NL: Tensor) -> Tensor:
    """Add up the codewords of codes (N, L): (N, D); a code of -1 leaves its level out."""
    total_ND = torch.zeros(len(codes_NL), codebooks[0].shape[1], device=codes_NL.device)
    for codebook_KD, codes_N in zip(codebooks, codes_NL.T, strict=True):
        total_ND = total_ND + codebook_KD[codes_N.clamp(min=0)] * (codes_N >= 0)[:, None]
    return total_ND


def without_nearest(codebook_KD: Tensor) -> Transform:
    """Make the function that leaves of vectors what the nearest codeword does not hold."""

    def subtract(block_ND: Tensor) -> Tensor:
        return block_ND - codebook_KD[nearest(block_ND, codebook_KD, spherical=False)[0]]

    return subtract
