"""Joining what the walk found with what the Hamming scan found: one list, ranked by cosine.

Legend: Q queries, D vector dimensions, K results, C candidates of a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.search.ranking import Ranked
from service.search.rescoring import Neighbours, best_by_cosine, cosines_of

OVERSAMPLING = 4  # codes scanned for each result: at 1 bit the cosine then restores what the codes lose


def join(
    walked: Ranked | None,
    near: Sequence[Neighbours],
    vectors_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    top_k: int,
) -> Ranked:
    """Rank the union of both ways' candidates by cosine, ties by document order.

    Args:
        walked: the walk's documents ranked by cosine, `top_k` of them at least where there are so many; None where
            nothing was walked.
        near: the scan's candidates of each query.
        vectors_QD: (Q, D) float32 unit vectors of the queries.
        vectors_ND: (N, D) float32 unit vectors of the documents; may be a memory map.
        top_k: K.

    Returns:
        The K best; `beam_QK` is -1 for a document that only the scan found.
    """
    shape = (len(near), min(top_k, len(vectors_ND)))
    joined = Ranked(
        position_QK=np.zeros(shape, np.int64),
        score_QK=np.zeros(shape),
        cosine_QK=np.zeros(shape, np.float32),
        beam_QK=np.full(shape, -1, np.int64),
        size_Q=np.zeros(len(near), np.int64),
    )
    for query, neighbours in enumerate(near):
        positions_C, beams_C = _union(walked, query, neighbours.positions_K)
        cosines_C = cosines_of(positions_C, vectors_QD[query], vectors_ND)
        best_K = best_by_cosine(positions_C, cosines_C, top_k)
        joined.size_Q[query] = len(best_K)
        used = (query, slice(0, len(best_K)))
        joined.position_QK[used], joined.beam_QK[used] = positions_C[best_K], beams_C[best_K]
        joined.score_QK[used] = joined.cosine_QK[used] = cosines_C[best_K]
    return joined


def _union(walked: Ranked | None, query: int, near_C: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return every candidate once, and the beam that led to each or -1."""
    if walked is None:
        return near_C, np.full(len(near_C), -1, np.int64)
    size = walked.size_Q[query]
    both = np.concatenate([walked.position_QK[query, :size], near_C])
    beams = np.concatenate([walked.beam_QK[query, :size], np.full(len(near_C), -1, np.int64)])
    positions_C, first_C = np.unique(both, return_index=True)  # the first is the walk's, which knows its beam
    return positions_C, beams[first_C]
