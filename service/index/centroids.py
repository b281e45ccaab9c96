"""Unit centroids of the trie's larger nodes: what the walk compares a query with.

Legend: N documents, D dimensions, M nodes, C stored centroids.

A node with at most `HANDFUL` documents has no stored centroid: the walk makes it from the documents' own vectors, which
lie side by side. A chain (a node whose only child holds the same documents) shares one row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.index.trie import Trie, node_ends

HANDFUL = 4


def build_centroids(trie: Trie, vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Average the documents under every node that holds more than a handful.

    Args:
        trie: the trie of the documents.
        vectors_ND: (N, D) float32 unit vectors in depth-first order; may be a memory map, read once per depth.

    Returns:
        centroids (C, D) float32, unit rows (a zero row where the vectors cancel out), and trie_centroid (M,) int32: the
        row of each node, -1 for nodes with at most `HANDFUL` documents.

    Raises:
        ValueError: the vectors are not those of the trie's documents.
    """
    if vectors_ND.ndim != 2 or len(vectors_ND) != trie.documents or vectors_ND.dtype != np.float32:
        raise ValueError(
            f"vectors are {vectors_ND.dtype} of shape {vectors_ND.shape}, the trie has {trie.documents} documents: "
            "one float32 row per document"
        )
    ends_M = node_ends(trie)
    row_M, rows = _number_rows(trie.lo_M, ends_M, trie.child_M, HANDFUL)
    centroids_CD = np.empty((rows, vectors_ND.shape[1]), np.float32)
    _average(trie.lo_M, ends_M, row_M, np.ascontiguousarray(vectors_ND), centroids_CD)
    return centroids_CD, row_M


@njit(cache=True, nogil=True)
def _number_rows(
    lo_M: NDArray[Any], ends_M: NDArray[Any], child_M: NDArray[Any], handful: int
) -> tuple[NDArray[np.int32], int]:
    """Give every node with more than a handful of documents a row; a child that holds all of its parent's shares it."""
    nodes = len(lo_M)
    row_M = np.full(nodes, -1, np.int32)
    rows = 0
    for node in range(nodes):
        size = np.int64(ends_M[node]) - np.int64(lo_M[node])
        if size > handful and row_M[node] < 0:
            row_M[node] = rows
            rows += 1
        first = child_M[node]
        if child_M[node + 1] - first == 1 and lo_M[first] == lo_M[node]:
            row_M[first] = row_M[node]
    return row_M, rows


@njit(cache=True, nogil=True)
def _average(
    lo_M: NDArray[Any],
    ends_M: NDArray[Any],
    row_M: NDArray[np.int32],
    vectors_ND: NDArray[np.float32],
    centroids_CD: NDArray[np.float32],
) -> None:
    """Fill the rows in order; sums are float64, so that a million documents lose nothing."""
    dimensions = vectors_ND.shape[1]
    done = 0
    for node in range(len(lo_M)):
        if row_M[node] != done:  # rows are numbered as nodes come: every other row is shared and already filled
            continue
        sum_D = np.zeros(dimensions, np.float64)
        for document in range(lo_M[node], ends_M[node]):
            for d in range(dimensions):
                sum_D[d] += vectors_ND[document, d]
        length = np.sqrt(np.sum(sum_D * sum_D))
        for d in range(dimensions):
            centroids_CD[done, d] = sum_D[d] / length if length > 0 else 0.0
        done += 1
