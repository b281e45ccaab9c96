"""Kernels of the Hamming scan. They trust their arguments: `hamming.py` checks them.

Shapes: Q queries, W words compared, G blocks of V = 32 documents, C slots of a query's candidate buffer.

A candidate is one uint64 key, distance << 32 | position, so that sorting keys sorts by distance and then by document
order. A buffer holds C > k keys in document order; when it is full, counting distances up to k finds the k-th smallest,
the nearer ones stay, and from then on only documents strictly nearer get in: a later document never displaces an
earlier one of its own distance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from service.search.kernel import KERNEL
from service.search.popcount import count_bits, prefetch, scan_block_for_four, scan_block_for_one, trailing_zeros

GROUP = 4  # queries that share the loads of a block
TILE_BYTES = 8_192  # of codes: this tile and the next, being prefetched, fill half of a 32 KB first-level cache
LINE_WORDS = 8  # of a 64-byte cache line
Words = npt.NDArray[np.uint64]
Tally = npt.NDArray[np.int32]


class Scratch(NamedTuple):
    """Working memory of a scan.

    Attributes:
        lines: offsets of the cache lines of a tile, see `tile_lines`.
        distances: (4 · 32,) uint64, of the documents of a block to a group of queries.
        masks: (4,) uint32, the documents of a block that are near enough.
        tally_T: int32, one for every possible distance.
    """

    lines: npt.NDArray[np.int64]
    distances: Words
    masks: npt.NDArray[np.uint32]
    tally_T: Tally


@njit(**KERNEL)
def select(keys_C: Words, count: int, k: int, bound: int, tally_T: Tally) -> tuple[int, np.uint64]:
    """Keep the k smallest of `count` keys, in their order.

    Args:
        keys_C: a buffer in document order; changed in place.
        count: keys that it holds, at least k.
        k: keys to keep.
        bound: no distance is greater.
        tally_T: scratch, longer than the greatest possible distance.

    Returns:
        keys kept (k), and the k-th smallest distance.
    """
    tally_T[: bound + 1] = 0
    for i in range(count):
        tally_T[keys_C[i] >> np.uint64(32)] += 1
    limit, within = bound, count  # keys within `limit`; counted from above, where the threshold was before
    while within - tally_T[limit] >= k:
        within -= tally_T[limit]
        limit -= 1
    ties = k - (within - tally_T[limit])
    kept = 0
    for i in range(count):
        # Without branches: which keys stay is a coin toss, and a mispredicted one costs more than a needless store.
        key = keys_C[i]
        distance = int(key >> np.uint64(32))
        tie = int(distance == limit) & int(ties > 0)
        ties -= tie
        keys_C[kept] = key
        kept += int(distance < limit) | tie
    return kept, np.uint64(limit)


@njit(**KERNEL, inline="always")
def admit(
    mask: np.uint32,
    first_position: int,
    distances: Words,
    at: int,
    query: int,
    k: int,
    keys_QC: Words,
    counts_Q: npt.NDArray[np.int64],
    thresholds_Q: Words,
    tally_T: Tally,
) -> None:
    """Put the documents that `mask` marks into a query's buffer; lower its threshold whenever the buffer fills.

    The distances of the block's 32 documents lie in `distances` from `at` on.
    """
    while mask:
        document = trailing_zeros(mask)
        mask &= mask - np.uint32(1)
        distance = distances[at + document]
        if distance < thresholds_Q[query]:
            count = counts_Q[query]
            keys_QC[query, count] = (distance << np.uint64(32)) | np.uint64(first_position + document)
            count += 1
            if count == keys_QC.shape[1]:
                bound = min(np.int64(thresholds_Q[query]), np.int64(len(tally_T) - 1))
                count, thresholds_Q[query] = select(keys_QC[query], count, k, bound, tally_T)
            counts_Q[query] = count


@njit(**KERNEL)
def eligible_documents(block: int, documents: int, eligible: Words) -> np.uint32:
    """Bits of the documents of a block that exist and, where a bitmap is given, are eligible."""
    mask = np.uint32(0xFFFFFFFF)
    if len(eligible):
        mask = np.uint32((eligible[block >> 1] >> np.uint64(32 * (block & 1))) & np.uint64(0xFFFFFFFF))
    left = documents - 32 * block
    if left < 32:
        mask &= np.uint32((1 << left) - 1)
    return mask


def new_scratch(words: int, stored_words: int) -> Scratch:
    """Return working memory for scans that compare so many words of the stored ones; one thread's at a time."""
    tile = max(1, TILE_BYTES // (words * 256))
    return Scratch(
        tile_lines(tile, words, stored_words * 32),
        np.empty(GROUP * 32, np.uint64),
        np.empty(GROUP, np.uint32),
        np.empty(words * 64 + 1, np.int32),
    )


def tile_lines(tile: int, words: int, stride: int) -> npt.NDArray[np.int64]:
    """Offsets in words of the cache lines that a tile of blocks reads; a prefix search skips the rest of each block."""
    blocks, lines = np.arange(tile)[:, None] * stride, np.arange(words * 32 // LINE_WORDS) * LINE_WORDS
    return (blocks + lines).ravel()


@njit(**KERNEL)
def scan_blocks(
    codes_GWV: Words,
    first: int,
    last: int,
    documents: int,
    queries_QW: Words,
    eligible: Words,
    k: int,
    keys_QC: Words,
    counts_Q: npt.NDArray[np.int64],
    thresholds_Q: Words,
    scratch: Scratch,
) -> None:
    """Scan blocks [first, last) for all queries, tile by tile, adding to each query's buffer.

    Args:
        codes_GWV: stored codes, C-contiguous; may have more words than the queries (a prefix search).
        first: first block.
        last: block after the last.
        documents: N; positions at and above it are padding.
        queries_QW: C-contiguous.
        eligible: bitmap of ceil(N / 64) words at least, or of none (all documents).
        k: results wanted, below C.
        keys_QC: candidate buffers; calls with ascending blocks continue them.
        counts_Q: keys that each buffer holds.
        thresholds_Q: distance that a document must stay below, `hamming.EVERYTHING` at the start.
        scratch: of `new_scratch` for these widths.
    """
    lines, distances, masks, tally_T = scratch
    queries, words = queries_QW.shape
    stride = codes_GWV.shape[1] * 32
    tile = len(lines) * LINE_WORDS // (words * 32)
    grouped = queries - queries % GROUP
    share = len(lines) * GROUP // max(grouped, 1) + 1  # lines of the next tile that a group asks for
    for start in range(first, last, tile):
        end = min(start + tile, last)
        asked = 0
        for query in range(0, grouped, GROUP):
            # Spread over the passes, the loads of the next tile hide behind this tile's arithmetic. A single query
            # has no arithmetic to hide them behind and leaves them to the hardware.
            for line in range(asked, min(asked + share, len(lines))):
                prefetch(codes_GWV, end * stride + lines[line])
            asked += share
            for block in range(start, end):
                if scan_block_for_four(
                    codes_GWV, block * stride, words, queries_QW, query, thresholds_Q, distances, masks
                ):
                    live = np.uint32(0xFFFFFFFF)
                    if len(eligible) or 32 * block + 32 > documents:
                        live = eligible_documents(block, documents, eligible)
                    for j in range(GROUP):
                        if masks[j] & live:
                            admit(
                                masks[j] & live, 32 * block, distances, 32 * j, query + j, k,
                                keys_QC, counts_Q, thresholds_Q, tally_T,
                            )  # fmt: skip
        for query in range(grouped, queries):
            for block in range(start, end):
                if scan_block_for_one(
                    codes_GWV, block * stride, words, queries_QW, query, thresholds_Q, distances, masks
                ):
                    live = eligible_documents(block, documents, eligible)
                    admit(masks[0] & live, 32 * block, distances, 0, query, k, keys_QC, counts_Q, thresholds_Q, tally_T)


@njit(cache=True, nogil=True)
def rest_distances(
    codes_GWV: Words,
    documents_P: npt.NDArray[np.int64],
    queries_QW: Words,
    rows_P: npt.NDArray[np.int64],
    first_word: int,
) -> npt.NDArray[np.int64]:
    """Distances of single (document, query) pairs over the words from `first_word` on.

    Args:
        codes_GWV: stored codes.
        documents_P: position of each pair's document.
        queries_QW: as wide as the stored codes.
        rows_P: row of each pair's query.
        first_word: words before it are left out.
    """
    distances_P = np.zeros(len(documents_P), np.int64)
    for i in range(len(documents_P)):
        block, place = documents_P[i] >> 5, documents_P[i] & 31
        for word in range(first_word, queries_QW.shape[1]):
            distances_P[i] += count_bits(codes_GWV[block, word, place] ^ queries_QW[rows_P[i], word])
    return distances_P
