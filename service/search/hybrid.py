"""Joining what the walk, the Hamming scan and the words found: one list.

Legend: Q queries, D vector dimensions, K results, C candidates of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.search.lexical import LexicalSearch, Tokens
from service.search.ranking import Ranked
from service.search.rescoring import best_by_score, cosines_of

OVERSAMPLING = 4  # candidates of each way for each result: at 1 bit the cosine then restores what the codes lose

Positions = NDArray[np.int64]


class Words(NamedTuple):
    """How words count: the search that knows them, each query's, and the weights of the cosine and of their share."""

    search: LexicalSearch
    tokens_Q: Sequence[Tokens]
    cosine_weight: float
    share_weight: float


def join(
    walked: Ranked | None,
    found: Sequence[Positions],
    vectors_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    top_k: int,
    said_QB: NDArray[np.float64] | None = None,
    words: Words | None = None,
) -> Ranked:
    """Rank the union of all ways' candidates by cosine + what the decoder said + words, ties by document order.

    Args:
        walked: the walk's documents; None where nothing was walked.
        found: the other ways' candidates (C,) of each query; a document may be there twice.
        vectors_QD: (Q, D) float32 unit vectors of the queries.
        vectors_ND: (N, D) float32 unit vectors of the documents; may be a memory map.
        top_k: K.
        said_QB: what the decoder made of each beam of the walk, added to the cosine; a document that the walk did not
            find has the least that it said of the query's candidates. None leaves it out.
        words: score by weight · cosine + weight · share of words; None by cosine alone.

    Returns:
        The K best; `beam_QK` is -1 for a document that the walk did not find.
    """
    shape = (len(found), min(top_k, len(vectors_ND)))
    joined = Ranked(
        position_QK=np.zeros(shape, np.int64),
        score_QK=np.zeros(shape),
        cosine_QK=np.zeros(shape, np.float32),
        beam_QK=np.full(shape, -1, np.int64),
        size_Q=np.zeros(len(found), np.int64),
        lexical_QK=None if words is None else np.zeros(shape, np.float32),
    )
    for query, others_C in enumerate(found):
        positions_C, beams_C = _union(walked, query, others_C)
        cosines_C = cosines_of(positions_C, vectors_QD[query], vectors_ND)
        scores_C = cosines_C.astype(np.float64)
        if said_QB is not None:
            scores_C += _said(said_QB[query], beams_C)
        if words is not None:
            shares_C = words.search.shares(words.tokens_Q[query], positions_C)
            scores_C = words.cosine_weight * scores_C + words.share_weight * shares_C
        best_K = best_by_score(positions_C, scores_C, top_k)
        joined.size_Q[query] = len(best_K)
        used = (query, slice(0, len(best_K)))
        joined.position_QK[used], joined.beam_QK[used] = positions_C[best_K], beams_C[best_K]
        joined.score_QK[used], joined.cosine_QK[used] = scores_C[best_K], cosines_C[best_K]
        if joined.lexical_QK is not None:
            joined.lexical_QK[used] = shares_C[best_K]
    return joined


def _said(said_B: NDArray[np.float64], beams_C: Positions) -> NDArray[np.float64]:
    """What the decoder made of each candidate (C,), the least of it for those that the walk did not find."""
    walked_C, said_C = beams_C >= 0, said_B[beams_C]
    return np.where(walked_C, said_C, said_C[walked_C].min() if walked_C.any() else 0.0)


def _union(walked: Ranked | None, query: int, others_C: Positions) -> tuple[Positions, Positions]:
    """Return every candidate once, and the beam that led to each or -1."""
    size = 0 if walked is None else int(walked.size_Q[query])
    both, beams = others_C, np.full(len(others_C), -1, np.int64)
    if walked is not None:
        both = np.concatenate([walked.position_QK[query, :size], both])
        beams = np.concatenate([walked.beam_QK[query, :size], beams])
    positions_C, first_C = np.unique(both, return_index=True)  # the first is the walk's, which knows its beam
    return positions_C, beams[first_C]
