"""From beams to documents: expand the leaves, order what they hold, keep the first k.

Legend: Q queries, B beams, N documents, D vector dimensions, K results.

- `lexicographic`: beam score, then cosine, then document order (DGI, section 5.1.4). Where a beam's score holds its
  node's reach, a document has its own cosine in the place of it.
- `cosine`: cosine, then document order.
- `fused`: beam score + weight · cosine, then document order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.filters import DocumentFilter, count_eligible
from service.search.kernel import KERNEL
from service.search.scores import dot_row
from service.search.selection import Best, new_best, offer, sort_best
from service.search.tables import frozen
from service.search.walk import Beams

Ranking = Literal["lexicographic", "cosine", "fused"]
RANKINGS: tuple[str, ...] = get_args(Ranking)
_LEXICOGRAPHIC, _COSINE, _FUSED = range(3)
_REACH_ROUNDING = 1e-6  # a leaf's reach and its document's cosine are one product, summed in two orders


@dataclass(frozen=True, eq=False)
class Ranked:
    """The first K documents of every query.

    Attributes:
        position_QK: (Q, K) int64 document positions.
        score_QK: (Q, K) float64, what they are ordered by: the beam's score, the cosine, or both fused.
        cosine_QK: (Q, K) float32, query · document.
        beam_QK: (Q, K) int64, the beam that each was found by.
        size_Q: (Q,) int64, how many of the K columns are in use.
        lexical_QK: (Q, K) float32, the share of the query's words; None where words were not looked for.
    """

    position_QK: NDArray[np.int64]
    score_QK: NDArray[np.float64]
    cosine_QK: NDArray[np.float32]
    beam_QK: NDArray[np.int64]
    size_Q: NDArray[np.int64]
    lexical_QK: NDArray[np.float32] | None = None


def rank(
    beams: Beams,
    ranking: Ranking,
    top_k: int,
    vectors_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    fusion_weight: float = 1.0,
    eligible: DocumentFilter | None = None,
) -> Ranked:
    """Expand beams into documents and order them.

    Args:
        beams: the walk's result.
        ranking: `lexicographic`, `cosine` or `fused`.
        top_k: K, at least 1; of a leaf that holds more documents the K best by cosine are taken.
        vectors_QD: (Q, D) float32 unit vectors of the queries.
        vectors_ND: (N, D) float32 unit vectors of the documents; may be a memory map.
        fusion_weight: weight of the cosine in `fused`.
        eligible: the documents that may be returned.

    Raises:
        ValueError: no such ranking, `top_k` below 1, vectors of other dimensions, or a filter over other documents.

    Costs one product per document expanded; `lexicographic` expands beams only until K documents are found.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"ranking {ranking!r} does not exist: choose one of {', '.join(RANKINGS)}")
    if isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k {top_k} is below 1")
    if vectors_QD.shape != (len(beams.size_Q), vectors_ND.shape[1]) or vectors_QD.dtype != np.float32:
        raise ValueError(
            f"query vectors are {vectors_QD.dtype} of shape {vectors_QD.shape}, "
            f"expected float32 of ({len(beams.size_Q)}, {vectors_ND.shape[1]})"
        )
    if eligible is not None and eligible.documents != len(vectors_ND):
        raise ValueError(f"the filter is over {eligible.documents} documents, the index has {len(vectors_ND)}")
    top_k = min(top_k, len(vectors_ND))
    words_W = frozen(np.zeros(0, np.uint64) if eligible is None else eligible.words_W)
    ranks_W = frozen(np.zeros(0, np.uint32) if eligible is None else eligible.ranks_W)
    ranked = _empty(len(vectors_QD), top_k)
    _rank_all(
        beams.lo_QB, beams.hi_QB, beams.score_QB, beams.geometry_QB, beams.weight, beams.size_Q,
        RANKINGS.index(ranking), fusion_weight,
        np.ascontiguousarray(vectors_QD), frozen(vectors_ND), words_W, ranks_W, new_best(top_k),
        ranked.position_QK, ranked.score_QK, ranked.cosine_QK, ranked.beam_QK, ranked.size_Q,
    )  # fmt: skip
    return ranked


def _empty(queries: int, top_k: int) -> Ranked:
    shape = (queries, top_k)
    return Ranked(
        position_QK=np.zeros(shape, np.int64),
        score_QK=np.zeros(shape),
        cosine_QK=np.zeros(shape, np.float32),
        beam_QK=np.zeros(shape, np.int64),
        size_Q=np.zeros(queries, np.int64),
    )


@njit(**KERNEL)
def _rank_all(
    lo_QB: NDArray[np.int64], hi_QB: NDArray[np.int64], score_QB: NDArray[np.float64],
    geometry_QB: NDArray[np.float64], reach_weight: float, size_Q: NDArray[np.int64],
    ranking: int, weight: float, vectors_QD: NDArray[np.float32], vectors_ND: NDArray[np.float32],
    words_W: NDArray[np.uint64], ranks_W: NDArray[np.uint32], best: Best,
    position_QK: NDArray[np.int64], out_QK: NDArray[np.float64], cosine_QK: NDArray[np.float32],
    beam_QK: NDArray[np.int64], found_Q: NDArray[np.int64],
) -> None:  # fmt: skip
    """Fill the results of every query; beams are sorted, best first."""
    for query in range(len(size_Q)):
        found, vector_D = np.int64(0), vectors_QD[query]
        for beam in range(size_Q[query]):
            score = score_QB[query, beam]
            full = found == len(best.primary)
            if ranking == _LEXICOGRAPHIC and full and score + reach_weight * _REACH_ROUNDING < best.primary[0]:
                break
            base, lo, hi = score - geometry_QB[query, beam], lo_QB[query, beam], hi_QB[query, beam]
            for document in range(lo, hi):
                if len(words_W) > 0 and count_eligible(words_W, ranks_W, document, document + 1) == 0:
                    continue
                cosine = np.float64(dot_row(vectors_ND, document, vector_D))
                primary = base + reach_weight * cosine
                if ranking == _COSINE:
                    primary = cosine
                elif ranking == _FUSED:
                    primary += weight * cosine
                secondary = cosine if ranking == _LEXICOGRAPHIC else 0.0
                found = offer(best, found, primary, secondary, document, beam)
        sort_best(best, found)
        found_Q[query] = found
        for place in range(found):
            position_QK[query, place], beam_QK[query, place] = best.number[place], best.origin[place]
            out_QK[query, place] = best.primary[place]
            cosine_QK[query, place] = dot_row(vectors_ND, best.number[place], vector_D)
