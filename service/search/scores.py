"""Numba kernels that score nodes: products with centroids and tokens, and their normalisers.

Legend: Q queries, B beams, U columns of a decoder call (unfinished beams), N documents, L levels, K tokens of a level,
T tokens, M nodes, C centroids, W words, D vector dimensions, E token dimensions, R children of the root.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.walk_state import GUIDED, Rules, Scalar, Scores, Scratch, Tables


@njit(cache=True, nogil=True, fastmath=True)
def dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> Scalar:
    """Return the product of two float32 vectors; fastmath lets LLVM vectorise the sum."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True, fastmath=True)
def mean_cosine(
    vectors_ND: NDArray[np.float32], lo: int, hi: int, vector_D: NDArray[np.float32], sum_D: NDArray[np.float32]
) -> Scalar:
    """Return the product of a query and the normalised mean of documents `[lo, hi)`."""
    if hi - lo == 1:
        return dot(vectors_ND[lo], vector_D)
    sum_D[:] = vectors_ND[lo]
    for document in range(lo + 1, hi):
        row_D = vectors_ND[document]
        for d in range(len(sum_D)):
            sum_D[d] += row_D[d]
    square = dot(sum_D, sum_D)
    return dot(sum_D, vector_D) / np.sqrt(square) if square > 0 else np.float32(0)


@njit(cache=True, nogil=True)
def node_cosine(
    tables: Tables, node: int, lo: int, hi: int, vector_D: NDArray[np.float32], sum_D: NDArray[np.float32]
) -> Scalar:
    """Return the product of a query and a node's unit centroid, stored or made from its handful of documents."""
    row = tables.centroid_M[node]
    if row >= 0:
        return dot(tables.centroids_CD[row], vector_D)
    return mean_cosine(tables.vectors_ND, lo, hi, vector_D, sum_D)


@njit(cache=True, nogil=True)
def child_end(tables: Tables, child: int, last: int, hi: int) -> Scalar:
    """Return the end of a child's documents: its next sibling's first, or its parent's end."""
    return np.int64(tables.lo_M[child + 1]) if child + 1 < last else hi


@njit(cache=True, nogil=True)
def product(tables: Tables, scores: Scores, query: int, column: int, token: int) -> Scalar:
    """Return hidden · token, looked up where the whole level was multiplied at once."""
    code = token - scores.level_lo
    if 0 <= code < scores.dense_QUK.shape[2]:
        return scores.dense_QUK[query, column, code]
    return dot(scores.hidden_QUE[query, column], tables.tokens_TE[token])


@njit(cache=True, nogil=True)
def log_sum_exp(logits: NDArray[np.float64], count: int) -> Scalar:
    """Return the logarithm of the sum of exponentials of the first `count` logits."""
    largest = logits[0]
    for i in range(1, count):
        largest = max(largest, logits[i])
    total = 0.0
    for i in range(count):
        total += np.exp(logits[i] - largest)
    return largest + np.log(total)


@njit(cache=True, nogil=True)
def vocabulary_log_sum(tables: Tables, scores: Scores, query: int, column: int, logits: NDArray[np.float64]) -> Scalar:
    """Return the normaliser over the level's whole vocabulary."""
    count = scores.dense_QUK.shape[2]
    for code in range(count):
        token = scores.level_lo + code
        logits[code] = np.float64(tables.scale_T[token]) * np.float64(scores.dense_QUK[query, column, code])
    return log_sum_exp(logits, count)


@njit(cache=True, nogil=True)
def fill_logits(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, query: int, column: int, node: int, hi: int
) -> None:
    """Fill the logits of a node's children: the decoder's, and the query's cosine to each child where guided."""
    first, last = np.int64(tables.child_M[node]), np.int64(tables.child_M[node + 1])
    for child in range(first, last):
        token = np.int64(tables.token_M[child])
        logit = np.float64(tables.scale_T[token]) * np.float64(product(tables, scores, query, column, token))
        if rules.scoring == GUIDED:
            cosine = child_cosine(tables, scores, scratch, query, node, child, hi)
            logit += np.float64(tables.weight_T[token]) * np.float64(cosine)
        scratch.logits[child - first] = logit


@njit(cache=True, nogil=True)
def child_cosine(
    tables: Tables, scores: Scores, scratch: Scratch, query: int, node: int, child: int, hi: int
) -> Scalar:
    """Return the query's cosine to a child; the root's children were all multiplied at once."""
    if node == 0:
        return scores.root_QR[query, child - 1]
    lo = np.int64(tables.lo_M[child])
    end = child_end(tables, child, np.int64(tables.child_M[node + 1]), hi)
    return node_cosine(tables, child, lo, end, scores.vectors_QD[query], scratch.sum_D)
