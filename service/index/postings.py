"""The inverted index: which documents hold which of the encoder's tokens, and what each match is worth (BM25).

Letters: N documents, V tokens of the tokenizer, P postings (pairs of a token and a document that holds it).

Terms are the tokens of the model's own `tokenizer.json`, of whole texts: no second vocabulary, no stemmer, no language.
The worth of token t in document d is (Robertson and Zaragoza 2009, section 3.5; Lucene's idf, which is never below 0)

    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))
    worth(t, d) = idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length(d) / mean length))

and is computed when the index is built: a search only adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.index.arrays import write_array

K1: Final = 1.2
B: Final = 0.75


@dataclass(frozen=True, eq=False)
class Postings:
    """Postings of all tokens, one token after the other, each by document position.

    Attributes:
        start_V: (V + 1,) int64, where each token's postings begin, and P at the end.
        document_P: (P,) int32 document positions.
        worth_P: (P,) float32, what the match adds to a document's score.
    """

    start_V: NDArray[np.int64]
    document_P: NDArray[np.int32]
    worth_P: NDArray[np.float32]

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.start_V) - 1


def words_of(title: str, text: str) -> str:
    """What of a document is indexed."""
    return f"{title} {text}"


def build_postings(documents: Iterable[Sequence[Sequence[int]]], vocabulary: int) -> Postings:
    """Build the inverted index; takes some thirty-five bytes of memory a posting.

    Args:
        documents: the token ids of all documents in their order, some documents at a time.
        vocabulary: V; every id is below.
    """
    parts: list[tuple[NDArray[np.int32], ...]] = [(np.zeros(0, np.int32),) * 4]
    count = 0
    for rows in documents:
        parts.append(_count(rows, count))
        count += len(rows)
    columns = zip(*parts, strict=True)
    del parts
    token_P, document_P, times_P, length_N = (np.concatenate(column) for column in columns)
    order_P = np.argsort(token_P, kind="stable")
    frequency_V = np.bincount(token_P, minlength=vocabulary)
    start_V = np.concatenate([[0], np.cumsum(frequency_V)]).astype(np.int64)
    del token_P
    document_P, times_P = document_P[order_P], times_P[order_P]
    del order_P
    mean = float(length_N.mean()) if length_N.any() else 1.0
    longer_N = (K1 * (1 - B + B * length_N / mean)).astype(np.float32)
    worth_P = times_P.astype(np.float32)
    worth_P /= worth_P + longer_N[document_P]
    worth_P *= np.repeat((idf(frequency_V, count) * (K1 + 1)).astype(np.float32), frequency_V)
    return Postings(start_V, document_P, worth_P)


def idf(frequency_V: NDArray[np.int64], documents: int) -> NDArray[np.float64]:
    """How much a match of each token says, by how many documents hold it."""
    result: NDArray[np.float64] = np.log1p((documents - frequency_V + 0.5) / (frequency_V + 0.5))
    return result


_ROW_BITS = 32  # a key is a token and, below these bits, a row of its block of documents


def _count(rows: Sequence[Sequence[int]], first: int) -> tuple[NDArray[np.int32], ...]:
    """Return the distinct pairs of token and document, how often each occurs, and the documents' lengths."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.asarray([token for row in rows for token in row], np.int64)
    keys, times = np.unique(tokens << _ROW_BITS | np.repeat(np.arange(len(rows)), lengths), return_counts=True)
    row_of_key = (keys & ((1 << _ROW_BITS) - 1)) + first
    return (keys >> _ROW_BITS).astype(np.int32), row_of_key.astype(np.int32), times.astype(np.int32), lengths


def write_postings(postings: Postings, folder: Path) -> None:
    """Write the three files of an inverted index."""
    write_array(folder / "postings_start.npy", postings.start_V)
    write_array(folder / "postings_document.npy", postings.document_P)
    write_array(folder / "postings_worth.npy", postings.worth_P)
