"""What a retriever stands beside: BM25, and exact search over dense vectors.

Shapes: Q queries, N documents, D dimensions, k results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.lines import DataError
from service.index.postings import K1, B

BATCH = 256


@dataclass(frozen=True, eq=False)
class Ranked:
    """Results of a batch of queries, best first: positions (Q, k) int64, -1 padded, with scores (Q, k) float32."""

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]


class BM25:
    """BM25 by bm25s: Lucene's variant, k1 and b as in the service's index, English stop words and stemmer.

    Args:
        texts: the documents, title and text in one string.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s
        import Stemmer

        self._tokenize: Callable[[Sequence[str]], list[list[str]]] = lambda batch: bm25s.tokenize(
            list(batch),
            stopwords="en",
            stemmer=Stemmer.Stemmer("english"),
            return_ids=False,
            show_progress=False,
        )
        self._index: Any = bm25s.BM25(method="lucene", k1=K1, b=B)
        self._index.index(self._tokenize(texts), show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> Ranked:
        """Give the best k documents of every query; documents without a common word are no results."""
        rows = [best(self._scores(tokens)[None], k) for tokens in self._tokenize(queries)]
        positions = np.concatenate([row.positions for row in rows])
        scores = np.concatenate([row.scores for row in rows])
        return Ranked(np.where(scores > 0, positions, -1), scores)

    def _scores(self, tokens: list[str]) -> NDArray[np.float32]:
        known = [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        scores: NDArray[np.float32] = self._index.get_scores(known)
        return scores


def dense_search(queries_QD: NDArray[np.float32], documents_ND: NDArray[np.floating[Any]], k: int) -> Ranked:
    """Search exactly by inner product: cosine, where both are unit vectors.

    Raises:
        DataError: different dimensions.
    """
    if queries_QD.shape[1] != documents_ND.shape[1]:
        raise DataError(
            f"queries have {queries_QD.shape[1]} dimensions, documents {documents_ND.shape[1]}: give vectors of one "
            "encoder"
        )
    documents_ND = np.asarray(documents_ND, dtype=np.float32)
    parts = [best(queries_QD[i : i + BATCH] @ documents_ND.T, k) for i in range(0, len(queries_QD), BATCH)]
    return Ranked(np.concatenate([p.positions for p in parts]), np.concatenate([p.scores for p in parts]))


def best(scores_QN: NDArray[np.float32], k: int) -> Ranked:
    """Give the k greatest scores of every row, greatest first, equal ones by position."""
    k = min(k, scores_QN.shape[1])
    threshold = -np.partition(-scores_QN, k - 1, axis=1)[:, k - 1 : k]
    positions = np.empty((len(scores_QN), k), dtype=np.int64)
    for row, (scores_N, least) in enumerate(zip(scores_QN, threshold, strict=True)):
        candidates = np.flatnonzero(scores_N >= least)
        positions[row] = candidates[np.argsort(-scores_N[candidates], kind="stable")[:k]]
    return Ranked(positions, np.take_along_axis(scores_QN, positions, axis=1).astype(np.float32))
