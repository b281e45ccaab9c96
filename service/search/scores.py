"""Numba kernels that score the children of one node: products with tokens, reaches of regions, and their normalisers.

Legend: K tokens of a level, T tokens, M nodes, C regions, R their rows, N documents, W words, D vector dimensions, E
token dimensions. Scores are written to the front of a scratch array, child `first + i` at place i.

They take plain arrays and index rows in place, and so need no reference counts even where numba makes them: each array
that is read out of a named tuple, and each row that is taken as a view, would cost one, and a few of those cost more
than a product of 384 numbers. `service.search.kernel` switches the counts off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.filters import count_eligible
from service.search.kernel import KERNEL
from service.search.walk_state import Scalar


@njit(**KERNEL, fastmath=True)
def dot_row(matrix: NDArray[np.float32], row: int, vector: NDArray[np.float32]) -> Scalar:
    """Return the product of a row and a vector; fastmath lets LLVM vectorise the sum."""
    total = np.float32(0)
    for i in range(len(vector)):
        total += matrix[row, i] * vector[i]
    return total


@njit(**KERNEL, fastmath=True)
def multiply_rows(
    left_XE: NDArray[np.float32], right_TE: NDArray[np.float32], lo: int, hi: int, out_XK: NDArray[np.float32]
) -> None:
    """Fill the products of all left rows with right rows `[lo, hi)`; as fast as BLAS on one core at these sizes.

    BLAS itself stays out of a request's way: its threads spin, and on a busy machine a product of 0.1 ms took 50 ms.
    Two rows by four at a time read each number once for eight sums; a last odd row or column is made twice.
    """
    rows = len(left_XE)
    for x0 in range(0, rows, 2):
        x1 = min(x0 + 1, rows - 1)
        for t0 in range(lo, hi, 4):
            t1, t2, t3 = min(t0 + 1, hi - 1), min(t0 + 2, hi - 1), min(t0 + 3, hi - 1)
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
            for e in range(left_XE.shape[1]):
                a, b = left_XE[x0, e], left_XE[x1, e]
                c0, c1, c2, c3 = right_TE[t0, e], right_TE[t1, e], right_TE[t2, e], right_TE[t3, e]
                a0, a1, a2, a3 = a0 + a * c0, a1 + a * c1, a2 + a * c2, a3 + a * c3
                b0, b1, b2, b3 = b0 + b * c0, b1 + b * c1, b2 + b * c2, b3 + b * c3
            for t, a, b in ((t0, a0, b0), (t1, a1, b1), (t2, a2, b2), (t3, a3, b3)):
                out_XK[x0, t - lo], out_XK[x1, t - lo] = a, b


@njit(**KERNEL, fastmath={"reassoc"})
def all_finite(values_QUE: NDArray[np.float32]) -> Scalar:
    """Say whether no number is NaN or infinite: zero times one of these is no zero."""
    total = np.float32(0)
    for value in values_QUE.flat:
        total += value * np.float32(0)
    return total == 0


@njit(**KERNEL)
def best_cosine(vectors_ND: NDArray[np.float32], lo: int, hi: int, vector_D: NDArray[np.float32]) -> Scalar:
    """Return the largest product of a query with documents `[lo, hi)`."""
    best = dot_row(vectors_ND, lo, vector_D)
    for document in range(lo + 1, hi):
        best = max(best, dot_row(vectors_ND, document, vector_D))
    return best


@njit(**KERNEL)
def node_reach(
    node: int, lo: int, hi: int, region_M: NDArray[np.int32], start_C: NDArray[np.int64], rest_C: NDArray[np.float32],
    rows_RD: NDArray[np.float32], vectors_ND: NDArray[np.float32], vector_D: NDArray[np.float32],
) -> Scalar:  # fmt: skip
    """Return how near the best document under a node is: by its region, or by the documents of a handful."""
    region = np.int64(region_M[node])
    if region < 0:
        return best_cosine(vectors_ND, lo, hi, vector_D)
    first, variance = start_C[region], rest_C[region]
    for row in range(first + 1, start_C[region + 1]):
        product = dot_row(rows_RD, row, vector_D)
        variance += product * product
    return dot_row(rows_RD, first, vector_D) + np.sqrt(variance)


@njit(**KERNEL)
def fold_reaches(
    products_QX: NDArray[np.float32], start_R: NDArray[np.int64], rest_R: NDArray[np.float32],
    reach_QR: NDArray[np.float32],
) -> None:  # fmt: skip
    """Fill the reaches of the root's children from the products with their rows; a rest below 0: rows are documents."""
    for query in range(len(products_QX)):
        for child in range(len(rest_R)):
            best = products_QX[query, start_R[child]]
            variance = rest_R[child]
            for x in range(start_R[child] + 1, start_R[child + 1]):
                product = products_QX[query, x]
                if rest_R[child] < 0:
                    best = max(best, product)
                else:
                    variance += product * product
            reach_QR[query, child] = best if rest_R[child] < 0 else best + np.sqrt(variance)


@njit(**KERNEL)
def child_end(lo_M: NDArray[np.uint32], child: int, last: int, hi: int) -> Scalar:
    """Return the end of a child's documents: its next sibling's first, or its parent's end."""
    return np.int64(lo_M[child + 1]) if child + 1 < last else hi


@njit(**KERNEL)
def mark_eligible(
    allowed: NDArray[np.bool_], lo_M: NDArray[np.uint32], first: int, last: int, hi: int,
    words_W: NDArray[np.uint64], ranks_W: NDArray[np.uint32],
) -> None:  # fmt: skip
    """Mark the children that hold an eligible document; without a filter all do."""
    for child in range(first, last):
        if len(words_W) == 0:
            allowed[child - first] = True
            continue
        lo, end = np.int64(lo_M[child]), child_end(lo_M, child, last, hi)
        allowed[child - first] = count_eligible(words_W, ranks_W, lo, end) > 0


@njit(**KERNEL)
def fill_reaches(
    reaches: NDArray[np.float64], allowed: NDArray[np.bool_], every: bool, lo_M: NDArray[np.uint32], first: int,
    last: int, hi: int, region_M: NDArray[np.int32], start_C: NDArray[np.int64], rest_C: NDArray[np.float32],
    rows_RD: NDArray[np.float32], vectors_ND: NDArray[np.float32], vector_D: NDArray[np.float32],
) -> None:  # fmt: skip
    """Fill the reaches of the children, of all of them or of those allowed."""
    for child in range(first, last):
        if every or allowed[child - first]:
            lo, end = np.int64(lo_M[child]), child_end(lo_M, child, last, hi)
            reaches[child - first] = node_reach(
                child, lo, end, region_M, start_C, rest_C, rows_RD, vectors_ND, vector_D
            )


@njit(**KERNEL)
def fill_logits(
    logits: NDArray[np.float64], token_M: NDArray[Any], first: int, last: int, scale_T: NDArray[np.float32],
    tokens_TE: NDArray[np.float32], hidden_E: NDArray[np.float32], dense_K: NDArray[np.float32], level_lo: int,
) -> None:  # fmt: skip
    """Fill the decoder's logits of the children, by look-up where the whole level was multiplied at once."""
    for child in range(first, last):
        token = np.int64(token_M[child])
        code = token - level_lo
        product = dense_K[code] if 0 <= code < len(dense_K) else dot_row(tokens_TE, token, hidden_E)
        logits[child - first] = np.float64(scale_T[token]) * np.float64(product)


@njit(**KERNEL)
def log_sum_exp(logits: NDArray[np.float64], count: int) -> Scalar:
    """Return the logarithm of the sum of exponentials of the first `count` logits."""
    largest = logits[0]
    for i in range(1, count):
        largest = max(largest, logits[i])
    total = 0.0
    for i in range(count):
        total += np.exp(logits[i] - largest)
    return largest + np.log(total)


@njit(**KERNEL)
def add_geometry(logits: NDArray[np.float64], geometry: NDArray[np.float64], weight: float, count: int) -> None:
    """Turn the decoder's logits into guided scores above the node's own, and reaches into weighted ones.

    What the decoder says counts against what geometry expects: logit - log sum p exp(logit), p the softmax of the
    weighted reaches alone. A decoder that says the same of all children changes nothing.
    """
    for i in range(count):
        geometry[i] *= weight
    expected = -log_sum_exp(geometry, count)
    for i in range(count):
        logits[i] += geometry[i]
    expected += log_sum_exp(logits, count)
    for i in range(count):
        logits[i] -= expected


@njit(**KERNEL)
def vocabulary_log_sum(
    logits: NDArray[np.float64], scale_T: NDArray[np.float32], dense_K: NDArray[np.float32], level_lo: int
) -> Scalar:
    """Return the normaliser over the whole span of tokens; overwrites the logits."""
    for code in range(len(dense_K)):
        logits[code] = np.float64(scale_T[level_lo + code]) * np.float64(dense_K[code])
    return log_sum_exp(logits, len(dense_K))
