"""Numba kernels that sort semantic IDs and lay out the trie; `trie.py` checks their input.

Legend: N documents, L levels, M nodes.

A row's *shared prefix* is the number of tokens that it has in common with the row before; a row that repeats the row
before is marked `REPEATED`. Everything else follows from it in two passes over the sorted rows, without any recursion:
the distinct row j opens the nodes of depth `shared[j] + 1` up to the depth where no other SID goes with it any more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

REPEATED = 255


@njit(cache=True, nogil=True)
def sort_by_column(column_N: NDArray[Any], order_N: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
    """Reorder `order_N` by `column_N`, stable; padding comes first. One counting pass."""
    largest = 0
    for value in column_N:
        if value != padding and value > largest:
            largest = value
    start = np.zeros(largest + 3, np.int64)  # slot 0 is the padding, slot t + 1 is token t
    for value in column_N:
        start[1 if value == padding else int(value) + 2] += 1
    for slot in range(1, len(start)):
        start[slot] += start[slot - 1]
    sorted_N = np.empty_like(order_N)
    for row in order_N:
        value = column_N[row]
        slot = 0 if value == padding else int(value) + 1
        sorted_N[start[slot]] = row
        start[slot] += 1
    return sorted_N


@njit(cache=True, nogil=True)
def shared_prefixes(sids_NL: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the tokens that each sorted row shares with the row before, (N,) uint8; `REPEATED` for an equal row."""
    documents, levels = sids_NL.shape
    shared_N = np.zeros(documents, np.uint8)
    for row in range(1, documents):
        level = 0
        while level < levels and sids_NL[row, level] == sids_NL[row - 1, level]:
            level += 1
        shared_N[row] = REPEATED if level == levels else level
    return shared_N


@njit(cache=True, nogil=True)
def _last_depth(sids_NL: NDArray[Any], row: int, before: int, after: int, padding: int) -> int:
    """Return the depth of the last node that the SID at `row` passes, given its shared prefixes on both sides."""
    depth = max(before, after) + 1
    length = 0
    while length < min(depth, sids_NL.shape[1]) and sids_NL[row, length] != padding:
        length += 1
    return length


@njit(cache=True, nogil=True)
def _next_distinct(shared_N: NDArray[np.uint8], row: int) -> int:
    """Return the first row behind `row` that holds another SID, or N."""
    row += 1
    while row < len(shared_N) and shared_N[row] == REPEATED:
        row += 1
    return row


@njit(cache=True, nogil=True)
def count_nodes(sids_NL: NDArray[Any], shared_N: NDArray[np.uint8], padding: int) -> NDArray[np.int64]:
    """Return the number of nodes of every depth, (L + 1,)."""
    documents = len(sids_NL)
    counts = np.zeros(sids_NL.shape[1] + 1, np.int64)
    counts[0] = 1
    row, before = 0, -1
    while row < documents:
        following = _next_distinct(shared_N, row)
        after = int(shared_N[following]) if following < documents else -1
        for depth in range(max(before, 0) + 1, _last_depth(sids_NL, row, before, after, padding) + 1):
            counts[depth] += 1
        row, before = following, after
    return counts


@njit(cache=True, nogil=True)
def fill_nodes(
    sids_NL: NDArray[Any], shared_N: NDArray[np.uint8], padding: int, level_start: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.uint32], NDArray[np.uint32]]:
    """Number the nodes breadth-first in one pass over the rows; returns token (M), lo (M), child (M + 1)."""
    nodes = level_start[-1]
    token_M = np.zeros(nodes, sids_NL.dtype)
    lo_M = np.zeros(nodes, np.uint32)
    child_M = np.full(nodes + 1, nodes, np.uint32)
    # a node's first child is the next node to be opened one depth below, whether it gets children or not
    following_node = np.full(len(level_start) + 1, nodes, np.int64)
    following_node[: len(level_start)] = level_start
    child_M[0] = following_node[1]
    row, before, documents = 0, -1, len(sids_NL)
    while row < documents:
        following = _next_distinct(shared_N, row)
        after = int(shared_N[following]) if following < documents else -1
        for depth in range(max(before, 0) + 1, _last_depth(sids_NL, row, before, after, padding) + 1):
            node = following_node[depth]
            following_node[depth] += 1
            token_M[node] = sids_NL[row, depth - 1]
            lo_M[node] = row
            child_M[node] = following_node[depth + 1]
        row, before = following, after
    return token_M, lo_M, child_M


@njit(cache=True, nogil=True)
def fill_ends(lo_M: NDArray[np.uint32], child_M: NDArray[np.uint32], documents: int) -> NDArray[np.uint32]:
    """Return the end of every node's documents, (M,) uint32: the parents come before their children."""
    ends_M = np.zeros(len(lo_M), np.uint32)  # of a node that is nobody's child it stays 0, which is refused
    ends_M[0] = documents
    for node in range(len(lo_M)):
        last = child_M[node + 1]
        for child in range(child_M[node], last):
            ends_M[child] = lo_M[child + 1] if child + 1 < last else ends_M[node]
    return ends_M
