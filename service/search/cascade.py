"""Two-stage Hamming search over Matryoshka prefixes: scan a prefix of every code, then the rest of a few.

Shapes: Q queries, W words, K results, S shortlisted documents of a query.

It is opt-in because it is not exact: a document whose prefix is too far never meets its remaining words. How often
that happens depends on the corpus, so `measure_cascade_recall` measures it there. On random codes a shortlist of 1 %
after a third of the words keeps .73 of the top 10; codes whose early words carry more keep .97 and above. It
pays where few documents are kept of long codes: one query against a million codes of 18 words was four times as fast as
the exact scan with a shortlist of a thousandth, and slower from a hundredth on, since keeping a long shortlist sorted
costs more than reading the rest of the codes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from service.model.layout import CodeError
from service.search.hamming import HammingIndex, Nearest, check_queries, hamming_topk

CANDIDATES_A_PASS = 1 << 21  # bounds the shortlists held at a time, some 40 bytes a candidate


def cascade_topk(
    index: HammingIndex,
    queries_QW: npt.NDArray[Any],
    k: int,
    words: int,
    share: float,
    eligible: npt.NDArray[Any] | None = None,
) -> Nearest:
    """Find nearly always the k nearest documents.

    Args:
        index: codes to search.
        queries_QW: uint64, as wide as the stored codes.
        k: results a query.
        words: words of the first stage, fewer than the codes have.
        share: part of the documents that reaches the second stage, in (0, 1]; never fewer than k documents.
        eligible: document bitmap, as in `hamming_topk`.

    Returns:
        Distances over all words; ties by document order; -1 where fewer than k documents are eligible.

    Raises:
        CodeError: wrong shapes or types, `words` or `share` out of range.
    """
    if not 1 <= words < index.words:
        raise CodeError(f"the first stage must compare 1 to {index.words - 1} of {index.words} words, got {words}")
    if not 0 < share <= 1:
        raise CodeError(f"the share of candidates must lie in (0, 1], got {share}")
    queries_QW = check_queries(index, queries_QW, index.words)
    shortlisted = max(k, math.ceil(share * index.documents))
    step = max(1, CANDIDATES_A_PASS // shortlisted)
    passes = [queries_QW[first : first + step] for first in range(0, max(1, len(queries_QW)), step)]
    parts = [_rescan(index, part, k, words, hamming_topk(index, part, shortlisted, words, eligible)) for part in passes]
    return Nearest(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _rescan(index: HammingIndex, queries_QW: npt.NDArray[np.uint64], k: int, words: int, shortlist: Nearest) -> Nearest:
    """Add the remaining words to the shortlist's distances and sort it anew."""
    rows_P, columns_P = np.nonzero(shortlist.positions_QK >= 0)
    positions_P = shortlist.positions_QK[rows_P, columns_P]
    rest_P = index.kernel.rest_distances(index.codes_GWV, positions_P, queries_QW, rows_P, words)
    distances_QS = np.full(shortlist.distances_QK.shape, np.iinfo(np.int32).max, np.int32)
    distances_QS[rows_P, columns_P] = shortlist.distances_QK[rows_P, columns_P] + rest_P
    nearest_QK = np.lexsort((shortlist.positions_QK, distances_QS))[:, :k]
    positions_QK = np.take_along_axis(shortlist.positions_QK, nearest_QK, axis=1)
    distances_QK = np.take_along_axis(distances_QS, nearest_QK, axis=1)
    return Nearest(np.where(positions_QK < 0, np.int32(-1), distances_QK), positions_QK)


def measure_cascade_recall(
    index: HammingIndex, queries_QW: npt.NDArray[Any], k: int, words: int, share: float
) -> float:
    """Measure which part of the exact top k the cascade finds, averaged over the queries (1.0: all of it).

    Args:
        index: codes to search, one document at least.
        queries_QW: uint64, as wide as the stored codes; one at least, not those that the adapter was trained on.
        k: results a query.
        words: words of the first stage.
        share: part of the documents that reaches the second stage.

    Raises:
        CodeError: as `cascade_topk`, or there is nothing to measure.
    """
    if not len(queries_QW) or not index.documents:
        raise CodeError(f"nothing to measure: {len(queries_QW)} queries, {index.documents} documents")
    exact = hamming_topk(index, queries_QW, min(k, index.documents)).positions_QK
    found = cascade_topk(index, queries_QW, min(k, index.documents), words, share).positions_QK
    shared = [len(np.intersect1d(a, b)) for a, b in zip(exact, found, strict=True)]
    return float(np.mean(shared) / exact.shape[1])
