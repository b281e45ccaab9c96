"""The Hamming scan in plain numpy: where numba is missing, and as the second opinion in tests.

Shapes: Q queries, W words compared, G blocks of V = 32 documents, C slots of a query's candidate buffer, P pairs.
Same contracts and the same answers as `hamming_kernel.py`, about fifty times slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
CHUNK_BLOCKS = 1024  # 32,768 documents: the temporaries stay around 10 MB at 40 words
_SHIFT = np.uint64(32)


def new_scratch(_words: int, _stored_words: int) -> None:
    """Return nothing: numpy brings its own temporaries."""


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
    _scratch: None = None,
) -> None:
    """Scan blocks [first, last); see `hamming_kernel.scan_blocks`."""
    for start in range(first, last, CHUNK_BLOCKS):
        end = min(start + CHUNK_BLOCKS, last)
        positions = np.arange(32 * start, 32 * end, dtype=np.uint64)
        live = _live(start, end, documents, eligible)
        for query in range(len(queries_QW)):
            differing = codes_GWV[start:end, : queries_QW.shape[1]] ^ queries_QW[query][:, None]
            distances = np.bitwise_count(differing).sum(axis=1, dtype=np.uint64).ravel()
            admitted = live & (distances < thresholds_Q[query])
            held = keys_QC[query, : counts_Q[query]]
            keys = np.sort(np.concatenate([held, (distances[admitted] << _SHIFT) | positions[admitted]]))[:k]
            keys_QC[query, : len(keys)] = keys
            counts_Q[query] = len(keys)
            if len(keys) == k:
                thresholds_Q[query] = keys[-1] >> _SHIFT


def _live(first: int, last: int, documents: int, eligible: Words) -> npt.NDArray[np.bool_]:
    """Documents of blocks [first, last) that exist and are eligible."""
    live = np.arange(32 * first, 32 * last) < documents
    if len(eligible):
        words = eligible[first // 2 : (last + 1) // 2].astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        live &= bits[32 * (first % 2) :][: len(live)].astype(bool)
    return live


def rest_distances(
    codes_GWV: Words, documents_P: npt.NDArray[Any], queries_QW: Words, rows_P: npt.NDArray[Any], first_word: int
) -> npt.NDArray[np.int64]:
    """Distances over the words from `first_word` on; see `hamming_kernel.rest_distances`."""
    codes_PW = codes_GWV[documents_P // 32, first_word:, documents_P % 32]
    differing = codes_PW ^ queries_QW[rows_P, first_word:]
    distances_P: npt.NDArray[np.int64] = np.bitwise_count(differing).sum(axis=1, dtype=np.int64)
    return distances_P
