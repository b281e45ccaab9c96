"""What the kernels of the walk pass each other: named tuples of arrays, so that numba sees plain arrays.

Legend: Q queries, B beams, U columns of a decoder call (unfinished beams), N documents, L levels, K tokens of a level,
T tokens, M nodes, C regions, R their rows, W words, D vector dimensions, E token dimensions, R children of the root.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.search.selection import Best

Scalar = Any  # a number inside a kernel: numba decides its width, mypy sees nothing behind njit

GENERATIVE, GUIDED, GEOMETRIC = 0, 1, 2
FINISHED = -1  # column of a beam that needs no decoder step


class Rules(NamedTuple):
    """What kind of walk this is.

    Attributes:
        scoring: GENERATIVE, GUIDED or GEOMETRIC.
        full: normalise over the depth's span of tokens, and walk every SID to its last token.
        padding: the value that pads rows of `sids_NL`.
        start: row of the start vector in `tokens_TE`.
        weight: of reaches in a score: 0 (GENERATIVE), 1 (GEOMETRIC), or beside the decoder's logits (GUIDED).
    """

    scoring: int
    full: bool
    padding: int
    start: int
    weight: float


class Tables(NamedTuple):
    """Read-only arrays of the bundle, as the kernels see them; unused ones are empty."""

    token_M: NDArray[Any]
    lo_M: NDArray[np.uint32]
    child_M: NDArray[np.uint32]
    sids_NL: NDArray[Any]
    tokens_TE: NDArray[np.float32]
    scale_T: NDArray[np.float32]
    region_M: NDArray[np.int32]
    start_C: NDArray[np.int64]
    rest_C: NDArray[np.float32]
    rows_RD: NDArray[np.float32]
    vectors_ND: NDArray[np.float32]
    words_W: NDArray[np.uint64]
    ranks_W: NDArray[np.uint32]


class Frontier(NamedTuple):
    """The beams of every query, best first.

    Attributes:
        node_QB, lo_QB, hi_QB: int64, the trie node and its documents (an end: only those that end there).
        score_QB: float64, summed log-probability, reach of the node (geometric), or both (guided).
        geometry_QB: float64, the part of the score that is the node's weighted reach; 0 under generative.
        column_QB: int64, the beam's column in the next decoder call, or FINISHED.
        size_Q: int64, beams in use.
        levels_QBL: float64, what each level added (geometric: the node's reach), NaN where nothing was walked;
            (Q, B, 0) unless asked for.
    """

    node_QB: NDArray[np.int64]
    lo_QB: NDArray[np.int64]
    hi_QB: NDArray[np.int64]
    score_QB: NDArray[np.float64]
    geometry_QB: NDArray[np.float64]
    column_QB: NDArray[np.int64]
    size_Q: NDArray[np.int64]
    levels_QBL: NDArray[np.float64]


class Scores(NamedTuple):
    """What is known before the children are scored.

    Attributes:
        vectors_QD: float32, the queries.
        hidden_QUE: float32, the decoder's states of the unfinished beams.
        dense_QUK: float32, their products with every token of the level, or (Q, U, 0): then made as needed.
        level_lo: the level's first token.
        root_QR: float32, reaches of the root's children; used at depth 0, empty for GENERATIVE.
    """

    vectors_QD: NDArray[np.float32]
    hidden_QUE: NDArray[np.float32]
    dense_QUK: NDArray[np.float32]
    level_lo: int
    root_QR: NDArray[np.float32]


class Scratch(NamedTuple):
    """Working memory of a walk.

    Attributes:
        logits, reaches: (T,) float64, of one node's children.
        allowed: (T,) bool, whether they hold an eligible document.
        best: the selection.
    """

    logits: NDArray[np.float64]
    reaches: NDArray[np.float64]
    allowed: NDArray[np.bool_]
    best: Best


class Order(NamedTuple):
    """What the decoder is asked next.

    Attributes:
        parent_QB: int64, the columns of its last call.
        token_QB: int64, the tokens to go on with.
        steps_Q: int64, the levels that each query was walked, the next one included.
    """

    parent_QB: NDArray[np.int64]
    token_QB: NDArray[np.int64]
    steps_Q: NDArray[np.int64]
