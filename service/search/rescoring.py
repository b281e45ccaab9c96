"""From candidates to their cosines: what the codes of a scan lose, the float vectors of a few documents restore.

Legend: N documents, D vector dimensions, K results, C candidates of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.kernel import KERNEL
from service.search.scores import dot_row
from service.search.tables import frozen


class Neighbours(NamedTuple):
    """What is near one query, best first.

    Attributes:
        positions_K: (K,) int64 document positions.
        distances_K: (K,) int32 differing bits.
        similarities_K: (K,) float32, 1 - distance / bits (QAMA eq. 24).
        cosines_K: (K,) float32 query · document, or None when not rescored.
    """

    positions_K: NDArray[np.int64]
    distances_K: NDArray[np.int32]
    similarities_K: NDArray[np.float32]
    cosines_K: NDArray[np.float32] | None


def rescore(
    found: Neighbours, vector_D: NDArray[np.float32], vectors_ND: NDArray[np.float32], top_k: int
) -> Neighbours:
    """Return the `top_k` candidates of one query by cosine, ties by document order.

    Args:
        found: the candidates.
        vector_D: (D,) float32, the query's unit vector.
        vectors_ND: (N, D) float32 unit vectors of the documents; may be a memory map.
        top_k: K.
    """
    cosines_C = cosines_of(found.positions_K, vector_D, vectors_ND)
    best_K = best_by_score(found.positions_K, cosines_C, top_k)
    return Neighbours(
        found.positions_K[best_K], found.distances_K[best_K], found.similarities_K[best_K], cosines_C[best_K]
    )


def cosines_of(
    positions_C: NDArray[np.int64], vector_D: NDArray[np.float32], vectors_ND: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the cosines (C,) float32 of some documents to one query: those that the walk gives them, to the last bit.

    A product of matrices would give equal documents unequal cosines, by the place where they stand.
    """
    cosines_C = np.empty(len(positions_C), np.float32)
    _fill_cosines(frozen(positions_C), frozen(vector_D), frozen(vectors_ND), cosines_C)
    return cosines_C


def best_by_score(positions_C: NDArray[np.int64], scores_C: NDArray[np.floating], top_k: int) -> NDArray[np.int64]:
    """Return the rows of the `top_k` greatest scores, greatest first, ties by document order."""
    return np.lexsort((positions_C, -scores_C))[:top_k]


@njit(**KERNEL)
def _fill_cosines(
    positions_C: NDArray[np.int64],
    vector_D: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    cosines_C: NDArray[np.float32],
) -> None:
    for place in range(len(positions_C)):
        cosines_C[place] = dot_row(vectors_ND, positions_C[place], vector_D)
