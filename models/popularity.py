"""Hits by how often a document is asked for: does the head overshadow the tail? (DGI section 5.4.2, figure 4).

Shapes: N documents, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bucket:
    """Documents of similar frequency.

    Attributes:
        least: smallest frequency.
        most: greatest frequency.
        documents: how many documents are in it.
        queries: how many of the queries ask for one of them.
        hits: how many of those found it.
    """

    least: int
    most: int
    documents: int
    queries: int
    hits: int


def hits_by_popularity(
    frequency_N: NDArray[np.integer[Any]],
    document_Q: NDArray[np.integer[Any]],
    hit_Q: NDArray[np.bool_],
    buckets: int = 5,
) -> list[Bucket]:
    """Split documents into buckets by frequency, head first, and count the hits of the queries that ask for them.

    Buckets hold about equally many documents; documents of one frequency are never parted, so with many ties (a tail
    that was never asked for) there are fewer buckets.

    Args:
        frequency_N: how often each document was asked for in training (`Dataset.popularity("train")`).
        document_Q: the position of each query's document.
        hit_Q: whether the query found it.
        buckets: how many at most.

    Raises:
        ValueError: no documents, buckets < 1, lengths that differ, or a position outside the documents.
    """
    documents = len(frequency_N)
    if not documents or buckets < 1:
        raise ValueError(f"need documents and at least one bucket, got {documents} documents and {buckets} buckets")
    if len(document_Q) != len(hit_Q):
        raise ValueError(f"{len(document_Q)} queries have documents, {len(hit_Q)} have hits: give both of every query")
    if len(document_Q) and (document_Q.min() < 0 or document_Q.max() >= documents):
        raise ValueError(f"document positions {document_Q.min()} to {document_Q.max()} of {documents} documents")
    ordered = np.sort(frequency_N)
    first_N, last_N = (np.searchsorted(ordered, frequency_N, side=side) for side in ("left", "right"))
    twice_N = 2 * documents - first_N - last_N - 1  # twice the middle place of the document's frequency, head first
    bucket_N = twice_N * buckets // (2 * documents)
    return [_bucket(frequency_N, bucket_N == b, document_Q, hit_Q) for b in np.unique(bucket_N)]


def head_mask(frequency_N: NDArray[np.integer[Any]], share: float) -> NDArray[np.bool_]:
    """Mark the head: about a `share` of the documents, those that are asked for most.

    Documents of one frequency are never parted, since any order among them would be chance: the head ends at the
    frequency that brings it nearest to the share, or holds the most frequent alone.

    Args:
        frequency_N: how often each document is asked for.
        share: above 0 and below 1.

    Raises:
        ValueError: no documents, or a share outside its range.
    """
    if not len(frequency_N) or not 0 < share < 1:
        raise ValueError(
            f"the head is a share above 0 and below 1 of some documents, got {share} of {len(frequency_N)}"
        )
    frequencies, counts = np.unique(frequency_N, return_counts=True)
    head_sizes = np.cumsum(counts[::-1])[::-1]  # documents at or above each frequency
    least = frequencies[np.argmin(np.abs(head_sizes - share * len(frequency_N)))]
    mask: NDArray[np.bool_] = frequency_N >= least
    return mask


def _bucket(
    frequency_N: NDArray[np.integer[Any]],
    inside_N: NDArray[np.bool_],
    document_Q: NDArray[np.integer[Any]],
    hit_Q: NDArray[np.bool_],
) -> Bucket:
    chosen, asked_Q = frequency_N[inside_N], inside_N[document_Q]
    return Bucket(
        int(chosen.min()), int(chosen.max()), int(inside_N.sum()), int(asked_Q.sum()), int((hit_Q & asked_Q).sum())
    )
