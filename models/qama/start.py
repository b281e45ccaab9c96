"""Where an adapter starts: rotations that balance the bits of sign codes (ours; the paper starts at random).

Shapes: N vectors, D dimensions.

Thresholding cuts every dimension alike, so a code is best when all dimensions carry the same variance. A rotation
leaves every cosine as it is and costs nothing; iterative quantization (ITQ, Gong and Lazebnik 2011) finds the one whose
signs lie nearest to the rotated vectors.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ITQ_ROUNDS = 30
ITQ_VECTORS = 20_000  # more change the rotation little and cost time


def balanced_rotation(vectors_ND: FloatArray, seed: int) -> FloatArray:
    """Give an orthogonal (D, D) matrix R so that the signs of `x @ R` quantise x well (ITQ over all dimensions)."""
    centred = _sample(vectors_ND, seed)
    return _itq(centred, np.random.default_rng((seed, 1)))


def nested_rotation(vectors_ND: FloatArray, prefixes: tuple[int, ...], seed: int) -> FloatArray:
    """Give an orthogonal (D, D) matrix that puts the greatest variance first and balances it within each prefix.

    Columns are principal components; the block that each prefix adds is rotated by an ITQ of its own.
    """
    centred = _sample(vectors_ND, seed)
    rng = np.random.default_rng((seed, 1))
    _, components = np.linalg.eigh(centred.T @ centred)
    components = components[:, ::-1]
    blocks = [components[:, first:last] for first, last in pairwise((0, *prefixes))]
    return np.concatenate([block @ _itq(centred @ block, rng) for block in blocks], axis=1)


def _sample(vectors_ND: FloatArray, seed: int) -> FloatArray:
    if len(vectors_ND) > ITQ_VECTORS:
        vectors_ND = vectors_ND[np.random.default_rng(seed).choice(len(vectors_ND), ITQ_VECTORS, replace=False)]
    centred: FloatArray = vectors_ND - vectors_ND.mean(axis=0)
    return centred


def _itq(centred_ND: FloatArray, rng: np.random.Generator) -> FloatArray:
    dims = centred_ND.shape[1]
    rotation: FloatArray = np.linalg.qr(rng.normal(size=(dims, dims)))[0].astype(np.float32)
    for _ in range(ITQ_ROUNDS):
        signs = np.where(centred_ND @ rotation > 0, np.float32(1), np.float32(-1))
        left, _, right = np.linalg.svd(centred_ND.T @ signs)
        rotation = left @ right
    return rotation
