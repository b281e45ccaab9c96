"""The walk: from the root of the trie to the best semantic IDs, one level a step, for all queries of a batch.

Legend: Q queries, B beams, U columns of a decoder call, L levels, K tokens of a level, D vector dimensions, E token
dimensions, T tokens, R children of the root, X rows of their regions.

A step asks the decoder for the unfinished beams only (packed to the left: beam b of a query is column `column_QB[b]`),
scores their children and keeps the best B of children, finished beams and ends. It stops when nothing is unfinished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.index.manifest import Normalisation, Scoring
from service.search.candidates import advance, advance_to_the_end
from service.search.filters import DocumentFilter
from service.search.scores import all_finite, fold_reaches, multiply_rows, node_reach
from service.search.selection import new_best
from service.search.tables import WalkTables, frozen
from service.search.walk_state import FINISHED, GENERATIVE, Frontier, Order, Rules, Scores, Scratch, Tables

MAX_BEAM_WIDTH = 1000

# One matrix product with the whole level beats a product per child from this share of the level's tokens on: a row
# of it costs 0.5 to 0.7 of as many single products (K 128 to 1,024, 10 to 100 beams), and those skip hopeless beams.
DENSE_SHARE = 0.7


class Step(Protocol):
    """One decoder step of a batch; it keeps its own caches and reorders them by `parents_QB`."""

    def __call__(
        self, embeddings_QBE: NDArray[np.float32], step: int, parents_QB: NDArray[np.int64] | None, /
    ) -> NDArray[np.float32]:
        """Return hidden states (Q, B, E); parents are columns of the call before, None at step 0."""


@dataclass(frozen=True, eq=False)
class Beams:
    """The finished beams of every query, best first.

    Attributes:
        node_QB: (Q, B) int64 trie nodes.
        lo_QB, hi_QB: (Q, B) int64, each beam's documents `[lo, hi)`: all hold one SID.
        score_QB: (Q, B) float64, log P(SID | query), the reach of the node (geometric), or both (guided).
        geometry_QB: (Q, B) float64, the part of the score that is the node's reach times `weight`; a document of the
            node has its own cosine in its place.
        weight: of reaches in the scores: 0 (generative), 1 (geometric), the model's (guided).
        size_Q: (Q,) int64, how many of the B columns are in use; the rest is undefined.
        steps_Q: (Q,) int64, levels that each query was walked; the decoder ran once for each, unless geometric.
        steps: decoder steps that were run for the batch.
        levels_QBL: (Q, B, L) float64 when explained: what each level added to the score (geometric: the
            reach at that level), NaN behind a beam's last step; else None.
    """

    node_QB: NDArray[np.int64]
    lo_QB: NDArray[np.int64]
    hi_QB: NDArray[np.int64]
    score_QB: NDArray[np.float64]
    geometry_QB: NDArray[np.float64]
    weight: float
    size_Q: NDArray[np.int64]
    steps_Q: NDArray[np.int64]
    steps: int
    levels_QBL: NDArray[np.float64] | None


def walk(
    tables: WalkTables,
    scoring: Scoring,
    normalisation: Normalisation,
    beam_width: int,
    vectors_QD: NDArray[np.float32],
    step: Step | None,
    eligible: DocumentFilter | None = None,
    explain: bool = False,
) -> Beams:
    """Find the best semantic IDs of every query.

    Args:
        tables: what to walk.
        scoring: `generative` (decoder), `geometric` (reach of the nodes' regions) or `guided` (both).
        normalisation: `constrained` (softmax over a node's children) or `full` (over the vocabulary of the levels
            that stand at this depth; `generative` only).
        beam_width: B, 1 to 1,000.
        vectors_QD: (Q, D) float32 unit vectors of the queries.
        step: the decoder of this batch; None for `geometric`.
        eligible: the documents that may be found; it removes children and never changes a probability.
        explain: whether to keep what each level added.

    Returns:
        The beams. With a beam that covers the tree they are exactly the best SIDs.

    Raises:
        ValueError: an argument is outside of its range, or the decoder gave values that are not finite.
    """
    _check(tables, scoring, normalisation, beam_width, vectors_QD, step, eligible)
    rules, arrays = tables.kernel_rules(scoring, normalisation), tables.kernel_tables(scoring, eligible)
    queries, levels = len(vectors_QD), len(tables.level_offsets) - 1
    vectors_QD = np.ascontiguousarray(vectors_QD)
    scratch = _scratch(tables, beam_width)
    root_QR = _root_reaches(tables, vectors_QD) if scoring != "generative" else np.zeros((queries, 0), np.float32)
    beams, after = (_frontier(queries, beam_width, levels if explain else 0) for _ in range(2))
    order = _order(queries, beam_width)
    columns = _start(rules, arrays, vectors_QD, beams, order, eligible)
    depth = children = 0
    if step is None:
        nothing = np.zeros((queries, beam_width, 0), np.float32)
        scores = Scores(vectors_QD, nothing, nothing, 0, root_QR)
        depth = advance_to_the_end(rules, arrays, scores, scratch, columns, beams, after, order)
        beams = after if depth % 2 else beams
    else:
        while columns:
            span = tables.spans[depth] if rules.full else tables.level_offsets[depth : depth + 2]
            hidden_QUE, dense_QUK = _decode(arrays, span, rules, order, columns, children, depth, step)
            scores = Scores(vectors_QD, hidden_QUE, dense_QUK, span[0], root_QR)
            columns, children = advance(rules, arrays, scores, scratch, depth, beams, after, order)
            beams, after = after, beams
            depth += 1
    levels_QBL = beams.levels_QBL if explain else None
    steps = 0 if step is None else depth
    return Beams(
        beams.node_QB, beams.lo_QB, beams.hi_QB, beams.score_QB, beams.geometry_QB, rules.weight, beams.size_Q,
        order.steps_Q, steps, levels_QBL,
    )  # fmt: skip


def _decode(
    arrays: Tables,
    span: tuple[int, ...],
    rules: Rules,
    order: Order,
    columns: int,
    children: int,
    depth: int,
    step: Step,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the decoder for the unfinished beams: hidden states (Q, U, E), and their products with a span of tokens.

    The products are (Q, U, K) where one matrix product is the cheaper way or all of them are needed, else (Q, U, 0).
    """
    queries = len(order.steps_Q)
    embeddings_QUE = arrays.tokens_TE[order.token_QB[:, :columns]]
    parents_QU = np.ascontiguousarray(order.parent_QB[:, :columns]) if depth else None
    hidden_QUE = np.ascontiguousarray(step(embeddings_QUE, depth, parents_QU))
    if hidden_QUE.shape != embeddings_QUE.shape or hidden_QUE.dtype != np.float32 or not all_finite(hidden_QUE):
        raise ValueError(
            f"decoder step {depth} gave {hidden_QUE.dtype} {hidden_QUE.shape} for float32 {embeddings_QUE.shape}, "
            "or values that are not finite"
        )
    lo, hi = span
    if not (rules.full or depth == 0 or children >= DENSE_SHARE * queries * columns * (hi - lo)):
        return hidden_QUE, np.zeros((queries, columns, 0), np.float32)
    products = _products(hidden_QUE.reshape(queries * columns, -1), arrays.tokens_TE, lo, hi)
    return hidden_QUE, products.reshape(queries, columns, hi - lo)


def _root_reaches(tables: WalkTables, vectors_QD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the reaches (Q, R) of the root's children: one product with all their rows, then folded."""
    rows_XD, start_R, rest_R = tables.root
    products_QX = _products(vectors_QD, rows_XD, 0, len(rows_XD))
    reach_QR = np.empty((len(vectors_QD), len(rest_R)), np.float32)
    fold_reaches(products_QX, start_R, rest_R, reach_QR)
    return reach_QR


def _products(left_XE: NDArray[np.float32], right_TE: NDArray[np.float32], lo: int, hi: int) -> NDArray[np.float32]:
    """Return the products of all left rows with right rows `[lo, hi)`, (X, hi - lo)."""
    products_XK = np.empty((len(left_XE), hi - lo), np.float32)
    multiply_rows(left_XE, frozen(right_TE), lo, hi, products_XK)
    return products_XK


def _start(
    rules: Rules,
    arrays: Tables,
    vectors_QD: NDArray[np.float32],
    beams: Frontier,
    order: Order,
    eligible: DocumentFilter | None,
) -> int:
    """Put the root into every query's beams; returns the columns of the first decoder call: 1, or 0 at once."""
    documents = len(arrays.vectors_ND)
    finished = int(arrays.child_M[1]) == 1 and not rules.full  # all documents share one SID
    possible = eligible is None or eligible.count(0, documents) > 0
    beams.hi_QB[:, 0] = documents  # node, first document and column are 0
    if finished:
        beams.column_QB[:, 0] = FINISHED
    if finished and rules.scoring != GENERATIVE:
        for query, vector_D in enumerate(vectors_QD):
            reach = node_reach(
                0, 0, documents, arrays.region_M, arrays.start_C, arrays.rest_C, arrays.rows_RD, arrays.vectors_ND,
                vector_D,
            )  # fmt: skip
            beams.score_QB[query, 0] = beams.geometry_QB[query, 0] = reach * rules.weight
    beams.size_Q[:] = possible
    order.token_QB[:, 0] = rules.start
    order.steps_Q[:] = possible and not finished
    return int(possible and not finished)


def _order(queries: int, beam_width: int) -> Order:
    """Return an order for nothing."""
    parent_QB, token_QB = np.zeros((2, queries, beam_width), np.int64)
    return Order(parent_QB, token_QB, np.zeros(queries, np.int64))


def _frontier(queries: int, beam_width: int, levels: int) -> Frontier:
    """Return empty beams."""
    node_QB, lo_QB, hi_QB, column_QB = np.zeros((4, queries, beam_width), np.int64)
    score_QB, geometry_QB = np.zeros((2, queries, beam_width))
    levels_QBL = np.empty((queries, beam_width, levels))
    if levels:
        levels_QBL[:] = np.nan
    return Frontier(
        node_QB, lo_QB, hi_QB, score_QB, geometry_QB, column_QB, np.zeros(queries, np.int64), levels_QBL,
    )  # fmt: skip


def _scratch(tables: WalkTables, beam_width: int) -> Scratch:
    """Return working memory: no node has more children than there are tokens."""
    widest = max(1, tables.level_offsets[-1])
    logits, reaches = np.zeros((2, widest))  # `generative` leaves the reaches so
    return Scratch(logits, reaches, np.empty(widest, np.bool_), new_best(beam_width))


def _check(
    tables: WalkTables,
    scoring: Scoring,
    normalisation: Normalisation,
    beam_width: int,
    vectors_QD: NDArray[np.float32],
    step: Step | None,
    eligible: DocumentFilter | None,
) -> None:
    """Refuse what no walk can do."""
    if scoring not in tables.scorings:
        raise ValueError(f"scoring {scoring!r} is not offered: choose one of {', '.join(tables.scorings)}")
    if normalisation not in ("constrained", "full"):
        raise ValueError(f"normalisation {normalisation!r} is neither 'constrained' nor 'full'")
    if isinstance(beam_width, bool) or not 1 <= beam_width <= MAX_BEAM_WIDTH:
        raise ValueError(f"beam width {beam_width} is not between 1 and {MAX_BEAM_WIDTH}")
    if (step is None) != (scoring == "geometric"):
        raise ValueError(f"scoring {scoring!r} walks {'with' if step is None else 'without'} a decoder step")
    wanted = tables.vectors.shape[1]
    if vectors_QD.ndim != 2 or vectors_QD.shape[1] != wanted or vectors_QD.dtype != np.float32:
        raise ValueError(f"queries are {vectors_QD.dtype} of shape {vectors_QD.shape}, expected float32 (Q, {wanted})")
    if not all_finite(vectors_QD):
        raise ValueError("query vectors hold values that are not finite")
    if eligible is not None and eligible.documents != tables.trie.documents:
        raise ValueError(f"the filter is over {eligible.documents} documents, the index has {tables.trie.documents}")
