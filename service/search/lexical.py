"""Lexical search: the documents that share words with a query, by BM25 over the inverted index of a bundle.

Legend: Q queries, N documents, T tokens of a query, V tokens of the tokenizer, P postings, K results, C candidates.

A score is the **share** of the query's words that a document holds, each weighed by how much it says: the document's
BM25 over the most that any document could have, so between 0 and 1 whatever the query and the corpus. In the mode
`hybrid` it is added to the cosine with a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.index.artefact import ArtefactError
from service.index.bundle import Bundle
from service.index.postings import K1, Postings, idf
from service.model.tokens import WordTokenizer, read_tokenizer
from service.search.filters import DocumentFilter, count_eligible
from service.search.kernel import KERNEL
from service.search.selection import Best, new_best, offer, sort_best
from service.search.tables import frozen

Tokens = NDArray[np.int64]  # (T,) distinct, what can add most first

_ROUNDING = 1.0001  # bounds are kept above what sums in single precision can come to
_LOOK_UP_COST = 16  # of a document among a token's postings, in postings read one after the other


class Matches(NamedTuple):
    """What shares words with a query, best first, ties by document order.

    Attributes:
        positions_K: (K,) int64 document positions.
        shares_K: (K,) float64, above 0 and at most 1.
    """

    positions_K: NDArray[np.int64]
    shares_K: NDArray[np.float64]


class LexicalSearch:
    """Searches an inverted index; threads may share it.

    Args:
        postings: of the documents; memory maps will do.
        documents: N.
        tokenizer: that the postings were made with.
    """

    def __init__(self, postings: Postings, documents: int, tokenizer: WordTokenizer) -> None:
        self.documents, self._tokenizer = documents, tokenizer
        self._start_V, self._document_P, self._worth_P = (
            frozen(array) for array in (postings.start_V, postings.document_P, postings.worth_P)
        )
        self._most_V = (K1 + 1) * idf(np.diff(postings.start_V), documents)  # what a token adds at most

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Return what is looked for in some texts."""
        return self.known(self._tokenizer.tokens(texts))

    def known(self, queries: Sequence[Sequence[int]]) -> list[Tokens]:
        """Return what is looked for: each query's tokens, once, that some document holds, the rarest first."""
        rows = [np.unique(np.asarray(row, np.int64)) for row in queries]
        held = [row_T[self._start_V[row_T + 1] > self._start_V[row_T]] for row_T in rows]
        return [row_T[np.argsort(-self._most_V[row_T], kind="stable")] for row_T in held]

    def search(self, tokens_Q: Sequence[Tokens], top_k: int, eligible: DocumentFilter | None = None) -> list[Matches]:
        """Find the documents with the greatest shares; exact.

        Args:
            tokens_Q: each query's, from `tokens`.
            top_k: K, at least 1; fewer where fewer documents match.
            eligible: the documents that may be found; None for all.
        """
        words_W = frozen(np.zeros(0, np.uint64) if eligible is None else eligible.words_W)
        ranks_W = frozen(np.zeros(0, np.uint32) if eligible is None else eligible.ranks_W)
        best = new_best(min(top_k, self.documents))
        score_N, touched_N = np.zeros(self.documents, np.float32), np.empty(self.documents, np.int32)
        found = []
        for tokens_T in tokens_Q:
            left_T = np.append(np.cumsum(self._most_V[tokens_T][::-1])[::-1], 0.0)
            size = _search(
                self._start_V, self._document_P, self._worth_P, tokens_T, left_T, words_W, ranks_W, score_N, touched_N,
                best,
            )  # fmt: skip
            found.append(Matches(best.number[:size].copy(), best.primary[:size] / self._most(tokens_T)))
        return found

    def shares(self, tokens_T: Tokens, positions_C: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the shares (C,) float64 of some documents, 0 for one that holds no word of the query."""
        score_C = np.zeros(len(positions_C), np.float32)
        _look_up(self._start_V, self._document_P, self._worth_P, tokens_T, frozen(positions_C), score_C)
        shares_C: NDArray[np.float64] = score_C.astype(np.float64) / self._most(tokens_T)
        return shares_C

    def _most(self, tokens_T: Tokens) -> float:
        """The score that no document exceeds; 1 for a query without words, which finds nothing."""
        return float(self._most_V[tokens_T].sum()) or 1.0


def open_lexical_search(bundle: Bundle) -> LexicalSearch | None:
    """Return the search over a bundle's words, or None for a bundle that was indexed without them.

    Raises:
        ArtefactError: the postings are of another tokenizer.
    """
    if bundle.postings is None:
        return None
    tokenizer = WordTokenizer(read_tokenizer(bundle.model.tokenizer_file))
    if bundle.postings.vocabulary != tokenizer.vocabulary:
        raise ArtefactError(
            f"bundle '{bundle.path}' has postings of {bundle.postings.vocabulary} tokens, its tokenizer has "
            f"{tokenizer.vocabulary}: index the corpus again with this model"
        )
    return LexicalSearch(bundle.postings, bundle.manifest.documents, tokenizer)


@njit(**KERNEL)
def _search(
    start_V: NDArray[np.int64], document_P: NDArray[np.int32], worth_P: NDArray[np.float32],
    tokens_T: NDArray[np.int64], left_T: NDArray[np.float64], words_W: NDArray[np.uint64], ranks_W: NDArray[np.uint32],
    score_N: NDArray[np.float32], touched_N: NDArray[np.int32], best: Best,
) -> int:  # fmt: skip
    """Keep the best, leave `score_N` all zeros again; returns how many are kept.

    Tokens come by what they can add, the most first. As soon as what is left cannot lift a document from nothing among
    the best, only documents that were met can still be (MaxScore: Turtle and Flood 1995): lists of common words are the
    longest, and are hardly read.
    """
    touched, threshold, place = 0, 0.0, 0
    while place < len(tokens_T) and left_T[place] * _ROUNDING >= threshold:
        for at in range(start_V[tokens_T[place]], start_V[tokens_T[place] + 1]):
            document = np.int64(document_P[at])
            if score_N[document] == 0.0:
                if len(words_W) > 0 and count_eligible(words_W, ranks_W, document, document + 1) == 0:
                    continue
                touched_N[touched] = document
                touched += 1
            score_N[document] += worth_P[at]
        place += 1
        if _pays(start_V, tokens_T, left_T, place, touched, len(best.primary)):
            threshold = _worst_of_best(score_N, touched_N, touched, best)
    least = threshold * (2 - _ROUNDING) - left_T[place] * _ROUNDING
    touched = _drop_hopeless(score_N, touched_N, touched, least)
    for rest in range(place, len(tokens_T)):
        _add_to_touched(start_V, document_P, worth_P, tokens_T[rest], score_N, touched_N, touched)
    found = np.int64(0)
    for row in range(touched):
        document = np.int64(touched_N[row])
        found = offer(best, found, np.float64(score_N[document]), 0.0, document, -1)
        score_N[document] = 0.0
    sort_best(best, found)
    return int(found)


@njit(**KERNEL)
def _pays(
    start_V: NDArray[np.int64], tokens_T: NDArray[np.int64], left_T: NDArray[np.float64], place: int, touched: int,
    wanted: int,
) -> bool:  # fmt: skip
    """Whether to look for the K-th best score: it may exceed what is left, and the next list is longer than that."""
    if place == len(tokens_T) or touched < wanted or left_T[0] - left_T[place] <= left_T[place]:
        return False
    return bool(start_V[tokens_T[place] + 1] - start_V[tokens_T[place]] > touched)


@njit(**KERNEL)
def _worst_of_best(
    score_N: NDArray[np.float32], touched_N: NDArray[np.int32], touched: int, best: Best
) -> float:  # fmt: skip
    """The score, so far, that a document has to reach to be among the K best."""
    found = np.int64(0)
    for row in range(touched):
        document = np.int64(touched_N[row])
        found = offer(best, found, np.float64(score_N[document]), 0.0, document, -1)
    return float(best.primary[0])


@njit(**KERNEL)
def _drop_hopeless(score_N: NDArray[np.float32], touched_N: NDArray[np.int32], touched: int, least: float) -> int:
    """Forget documents whose score is below `least`; returns how many are left."""
    kept = 0
    for row in range(touched):
        document = touched_N[row]
        if score_N[document] >= least:
            touched_N[kept] = document
            kept += 1
        else:
            score_N[document] = 0.0
    return kept


@njit(**KERNEL)
def _add_to_touched(
    start_V: NDArray[np.int64], document_P: NDArray[np.int32], worth_P: NDArray[np.float32],
    token: int, score_N: NDArray[np.float32], touched_N: NDArray[np.int32], touched: int,
) -> None:  # fmt: skip
    """Add a token to the documents that were met: by looking each up, or by reading the list, whichever is shorter."""
    lo, hi = start_V[token], start_V[token + 1]
    if touched * _LOOK_UP_COST < hi - lo:
        for row in range(touched):
            document = touched_N[row]
            score_N[document] += _worth(document_P, worth_P, lo, hi, document)
    else:
        for at in range(lo, hi):
            if score_N[document_P[at]] > 0.0:
                score_N[document_P[at]] += worth_P[at]


@njit(**KERNEL)
def _look_up(
    start_V: NDArray[np.int64], document_P: NDArray[np.int32], worth_P: NDArray[np.float32],
    tokens_T: NDArray[np.int64], positions_C: NDArray[np.int64], score_C: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add up what matches in some documents, in the order of `_search`, so that sums agree to the last bit."""
    for token in tokens_T:
        for row in range(len(positions_C)):
            score_C[row] += _worth(document_P, worth_P, start_V[token], start_V[token + 1], positions_C[row])


@njit(**KERNEL)
def _worth(
    document_P: NDArray[np.int32], worth_P: NDArray[np.float32], first: int, last: int, document: int
) -> np.float32:  # fmt: skip
    """What a token adds to a document, found among its postings by halving; 0 where it does not stand."""
    lo, hi = first, last
    while lo < hi:
        middle = (lo + hi) // 2
        if document_P[middle] < document:
            lo = middle + 1
        else:
            hi = middle
    return worth_P[lo] if lo < last and document_P[lo] == document else np.float32(0.0)
