"""Numba kernels of one step of the walk: score the children of every beam, keep the best; `walk.py` checks their input.

Legend: Q queries, B beams, U columns of a decoder call (unfinished beams), N documents, L levels, K tokens of a level,
T tokens, M nodes, W words, D vector dimensions, E token dimensions, R children of the root.

A query's beams are sorted, best first. Where scores are sums of log-probabilities no child scores above its beam, so
the pass over a query's beams stops at the first that could not enter the selection: exact, and at wide beams most
children are never scored.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.search.filters import count_eligible
from service.search.kernel import KERNEL
from service.search.scores import (
    add_geometry,
    best_cosine,
    child_end,
    fill_logits,
    fill_reaches,
    log_sum_exp,
    mark_eligible,
    vocabulary_log_sum,
)
from service.search.selection import Best, offer, sort_best
from service.search.walk_state import (
    FINISHED,
    GENERATIVE,
    GEOMETRIC,
    GUIDED,
    Frontier,
    Order,
    Rules,
    Scalar,
    Scores,
    Scratch,
    Tables,
)


@njit(**KERNEL)
def _is_eligible(tables: Tables, lo: int, hi: int) -> Scalar:
    """Say whether the filter leaves a document in `[lo, hi)`; without a filter every range has one."""
    return len(tables.words_W) == 0 or count_eligible(tables.words_W, tables.ranks_W, lo, hi) > 0


@njit(**KERNEL)
def _fill_child_reaches(
    tables: Tables, scores: Scores, scratch: Scratch, query: int, node: int, hi: int, every: bool
) -> None:
    """Fill the query's reaches of a node's children; the root's were all made at once."""
    first, last = np.int64(tables.child_M[node]), np.int64(tables.child_M[node + 1])
    if node == 0:
        for child in range(first, last):
            scratch.reaches[child - first] = scores.root_QR[query, child - first]
        return
    fill_reaches(
        scratch.reaches, scratch.allowed, every, tables.lo_M, first, last, hi, tables.region_M, tables.start_C,
        tables.rest_C, tables.rows_RD, tables.vectors_ND, scores.vectors_QD[query],
    )  # fmt: skip


@njit(**KERNEL)
def _fill_values(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, query: int, column: int, node: int, hi: int
) -> None:
    """Turn the logits of a node's children into what they add: log-probabilities, or guided scores."""
    first, last = np.int64(tables.child_M[node]), np.int64(tables.child_M[node + 1])
    dense_K = scores.dense_QUK[query, column]
    normaliser = 0.0
    if rules.full:  # first: it overwrites the logits
        normaliser = vocabulary_log_sum(scratch.logits, tables.scale_T, dense_K, scores.level_lo)
    fill_logits(
        scratch.logits, tables.token_M, first, last, tables.scale_T, tables.tokens_TE,
        scores.hidden_QUE[query, column], dense_K, scores.level_lo,
    )  # fmt: skip
    if rules.scoring == GUIDED:
        _fill_child_reaches(tables, scores, scratch, query, node, hi, np.bool_(True))
        add_geometry(scratch.logits, scratch.reaches, rules.weight, last - first)
        return
    if not rules.full:
        normaliser = log_sum_exp(scratch.logits, last - first)
    for place in range(last - first):  # rounding must not lift a child above its beam: the early stop relies on it
        scratch.logits[place] = min(scratch.logits[place] - normaliser, 0.0)


@njit(**KERNEL)
def _offer_all(
    best: Best, size: int, values: NDArray[np.float64], geometry: NDArray[np.float64], allowed: NDArray[np.bool_],
    base: float, beam: int, first: int, last: int,
) -> Scalar:  # fmt: skip
    """Offer the allowed children with the scores `base + values`; most are turned away by one comparison."""
    primary = best.primary
    for child in range(first, last):
        score = base + values[child - first]
        if allowed[child - first] and (size < len(primary) or score >= primary[0]):
            size = offer(best, size, score, geometry[child - first], child, beam)
    return size


@njit(**KERNEL)
def _offer_children(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, beams: Frontier, query: int, beam: int, size: int
) -> Scalar:
    """Offer the eligible children of one beam to the selection; probabilities are shares among all of them."""
    node, hi, score = beams.node_QB[query, beam], beams.hi_QB[query, beam], beams.score_QB[query, beam]
    first, last = np.int64(tables.child_M[node]), np.int64(tables.child_M[node + 1])
    mark_eligible(scratch.allowed, tables.lo_M, first, last, hi, tables.words_W, tables.ranks_W)
    values = scratch.logits
    base = score - beams.geometry_QB[query, beam]  # the node's own reach gives way to its children's
    if rules.scoring == GEOMETRIC:
        _fill_child_reaches(tables, scores, scratch, query, node, hi, np.bool_(False))
        values = scratch.reaches
    else:
        _fill_values(rules, tables, scores, scratch, query, beams.column_QB[query, beam], node, hi)
    return _offer_all(scratch.best, size, values, scratch.reaches, scratch.allowed, base, beam, first, last)


@njit(**KERNEL)
def _offer_end(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, beams: Frontier, query: int, beam: int, size: int
) -> Scalar:
    """Offer the documents that end at an inner node: with the node's score, and where geometry counts, their own."""
    node, lo, score = beams.node_QB[query, beam], beams.lo_QB[query, beam], beams.score_QB[query, beam]
    end, geometry = np.int64(tables.lo_M[tables.child_M[node]]), 0.0
    if end == lo or not _is_eligible(tables, lo, end):
        return size
    if rules.scoring != GENERATIVE:
        geometry = rules.weight * np.float64(best_cosine(tables.vectors_ND, lo, end, scores.vectors_QD[query]))
        score = score - beams.geometry_QB[query, beam] + geometry
    return offer(scratch.best, size, score, geometry, node, beam)


@njit(**KERNEL)
def _offer_rest(
    tables: Tables, scores: Scores, scratch: Scratch, beams: Frontier, depth: int, query: int, beam: int, size: int
) -> Scalar:
    """Offer the next token of a SID that stands alone: certain under `constrained`, not under `full`."""
    column, node = beams.column_QB[query, beam], beams.node_QB[query, beam]
    dense_K = scores.dense_QUK[query, column]
    normaliser = vocabulary_log_sum(scratch.logits, tables.scale_T, dense_K, scores.level_lo)
    fill_logits(
        scratch.logits, tables.sids_NL[beams.lo_QB[query, beam]], depth, depth + 1, tables.scale_T, tables.tokens_TE,
        scores.hidden_QUE[query, column], dense_K, scores.level_lo,
    )  # fmt: skip
    score = beams.score_QB[query, beam] + min(scratch.logits[0] - normaliser, 0.0)
    return offer(scratch.best, size, score, 0.0, node, beam)


@njit(**KERNEL)
def _select(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, beams: Frontier, depth: int, query: int
) -> Scalar:
    """Select the best of a query's children, ends and finished beams; returns how many, sorted in `scratch.best`."""
    size = np.int64(0)  # a plain 0 is a literal type: numba would compile everything below twice
    capacity = len(scratch.best.primary)
    for beam in range(beams.size_Q[query]):
        score, node = beams.score_QB[query, beam], beams.node_QB[query, beam]
        if rules.scoring == GENERATIVE and size == capacity and score < scratch.best.primary[0]:
            break  # neither this beam nor any behind it can enter
        if beams.column_QB[query, beam] == FINISHED:
            size = offer(scratch.best, size, score, beams.geometry_QB[query, beam], node, beam)
        elif tables.child_M[node] == tables.child_M[node + 1]:
            size = _offer_rest(tables, scores, scratch, beams, depth, query, beam, size)
        else:
            size = _offer_children(rules, tables, scores, scratch, beams, query, beam, size)
            size = _offer_end(rules, tables, scores, scratch, beams, query, beam, size)
    sort_best(scratch.best, size)
    return size


@njit(**KERNEL)
def _is_finished(rules: Rules, tables: Tables, node: int, lo: int, depth: int) -> Scalar:
    """Say whether a node at `depth` needs no further step."""
    if tables.child_M[node] != tables.child_M[node + 1]:
        return False
    levels = tables.sids_NL.shape[1]
    return not rules.full or depth >= levels or tables.sids_NL[lo, depth] == rules.padding


@njit(**KERNEL)
def _settle(
    rules: Rules, tables: Tables, best: Best, size: int, beams: Frontier, depth: int, query: int, after: Frontier,
    order: Order,
) -> Scalar:  # fmt: skip
    """Turn a query's selection into its next beams; returns how many are unfinished, and their children."""
    columns, children = 0, np.int64(0)
    for rank in range(size):
        origin, node = best.origin[rank], best.number[rank]
        parent, lo, hi = beams.node_QB[query, origin], beams.lo_QB[query, origin], beams.hi_QB[query, origin]
        finished, token = True, np.int64(rules.start)
        if beams.column_QB[query, origin] != FINISHED:
            if node != parent:  # a child
                lo, hi = (
                    np.int64(tables.lo_M[node]),
                    child_end(tables.lo_M, node, np.int64(tables.child_M[parent + 1]), hi),
                )
                finished = _is_finished(rules, tables, node, lo, depth + 1)
                token = np.int64(tables.token_M[node])
            elif tables.child_M[node] != tables.child_M[node + 1]:  # an end
                hi = np.int64(tables.lo_M[tables.child_M[node]])
            else:  # the rest of a SID that stands alone
                finished = _is_finished(rules, tables, node, lo, depth + 1)
                token = np.int64(tables.sids_NL[lo, depth])
        after.node_QB[query, rank], after.lo_QB[query, rank], after.hi_QB[query, rank] = node, lo, hi
        after.score_QB[query, rank], after.geometry_QB[query, rank] = best.primary[rank], best.secondary[rank]
        after.column_QB[query, rank] = FINISHED if finished else columns
        if not finished:
            order.parent_QB[query, columns] = beams.column_QB[query, origin]
            order.token_QB[query, columns] = token
            children += np.int64(tables.child_M[node + 1]) - np.int64(tables.child_M[node])
            columns += 1
        if after.levels_QBL.shape[2] > 0:
            _note_level(rules, beams, after, depth, query, origin, rank)
    after.size_Q[query] = size
    return columns, children


@njit(**KERNEL)
def _note_level(rules: Rules, beams: Frontier, after: Frontier, depth: int, query: int, origin: int, rank: int) -> None:
    """Note what this level added to a beam; nothing where the beam was finished or ended here."""
    for level in range(after.levels_QBL.shape[2]):
        after.levels_QBL[query, rank, level] = beams.levels_QBL[query, origin, level]
    walked = after.node_QB[query, rank] != beams.node_QB[query, origin]
    rest = after.hi_QB[query, rank] == beams.hi_QB[query, origin]
    if walked or (rules.full and rest and beams.column_QB[query, origin] != FINISHED):
        before = 0.0 if rules.scoring == GEOMETRIC else beams.score_QB[query, origin]
        after.levels_QBL[query, rank, depth] = after.score_QB[query, rank] - before


@njit(**KERNEL)
def advance(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, depth: int, beams: Frontier, after: Frontier,
    order: Order,
) -> Scalar:  # fmt: skip
    """Walk every query one level down, from `beams` to `after`.

    Returns:
        The largest number of unfinished beams of a query: the columns of the next decoder call. `order` holds their
        parents and tokens; columns that a query does not fill ask for the start token on column 0. And the children of
        all queries' unfinished beams.
    """
    columns, children = 0, np.int64(0)
    for query in range(len(beams.size_Q)):
        for column in range(order.parent_QB.shape[1]):
            order.parent_QB[query, column], order.token_QB[query, column] = 0, rules.start
        size = _select(rules, tables, scores, scratch, beams, depth, query)
        unfinished, below = _settle(rules, tables, scratch.best, size, beams, depth, query, after, order)
        order.steps_Q[query] += unfinished > 0
        columns, children = max(columns, unfinished), children + below
    return columns, children


@njit(**KERNEL)
def advance_to_the_end(
    rules: Rules, tables: Tables, scores: Scores, scratch: Scratch, columns: int, beams: Frontier, after: Frontier,
    order: Order,
) -> Scalar:  # fmt: skip
    """Walk without a decoder, all levels in one call: a call hands over some forty arrays, which costs like a level.

    Returns:
        The levels that were walked; the result is in `beams` if they are even, else in `after`.
    """
    depth = 0
    while columns:
        columns, _ = advance(rules, tables, scores, scratch, depth, beams, after, order)
        beams, after = after, beams
        depth += 1
    return depth
