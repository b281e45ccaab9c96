"""Which documents a request may see: a bitmap in document order with a rank directory.

Legend: N documents, W words of 64 documents each.

"Does this node still hold an eligible document" is a count over a range of documents, and a count is the difference of
two ranks: no mask per node is ever built, and a filter costs the walk two look-ups per child.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from service.search.kernel import KERNEL

WORD = 64


@dataclass(frozen=True, eq=False, repr=False)
class DocumentFilter:
    """The eligible documents.

    Attributes:
        documents: N.
        words_W: (W + 1,) uint64, bit i of word w is document 64 w + i; beyond the last document all is empty.
        ranks_W: (W + 1,) uint32, the eligible documents before each word.
    """

    documents: int
    words_W: NDArray[np.uint64]
    ranks_W: NDArray[np.uint32]

    @classmethod
    def from_mask(cls, mask_N: NDArray[np.bool_]) -> DocumentFilter:
        """Build from a boolean per document, (N,); raises ValueError for anything else."""
        if mask_N.ndim != 1 or mask_N.dtype != np.bool_:
            raise ValueError(f"a mask is one boolean per document, not {mask_N.dtype} of shape {mask_N.shape}")
        padded = np.zeros((len(mask_N) // WORD + 1) * WORD, np.bool_)
        padded[: len(mask_N)] = mask_N
        words_W = np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64)
        return cls(len(mask_N), words_W, _ranks(words_W))

    @classmethod
    def from_positions(cls, positions: ArrayLike, documents: int) -> DocumentFilter:
        """Build from the positions of eligible documents, in any order, repeats allowed.

        Raises:
            ValueError: a position is not in `0 .. documents - 1`.
        """
        chosen: NDArray[Any] = np.asarray(positions)
        if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(f"positions are integers, not {chosen.dtype}")
        if chosen.size and (chosen.min() < 0 or chosen.max() >= documents):
            raise ValueError(f"positions range from {chosen.min()} to {chosen.max()}, there are {documents} documents")
        words_W = np.zeros(documents // WORD + 1, np.uint64)
        places = chosen.astype(np.uint64).reshape(-1)
        np.bitwise_or.at(words_W, (places // np.uint64(WORD)).astype(np.int64), _1 << (places % np.uint64(WORD)))
        return cls(documents, words_W, _ranks(words_W))

    def count(self, lo: int, hi: int) -> int:
        """Return the eligible documents in `[lo, hi)`; raises ValueError outside of `0 .. N`."""
        if not 0 <= lo <= hi <= self.documents:
            raise ValueError(f"[{lo}, {hi}) is no range of {self.documents} documents")
        return int(count_eligible(self.words_W, self.ranks_W, lo, hi))

    def __repr__(self) -> str:
        """Name the filter by its content: an answer cache keys on it."""
        digest = hashlib.sha256(self.words_W.tobytes()).hexdigest()
        return f"DocumentFilter(documents={self.documents}, sha256={digest})"


def _ranks(words_W: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Count the bits that are set before each word."""
    return np.concatenate(([0], np.cumsum(np.bitwise_count(words_W), dtype=np.int64)[:-1])).astype(np.uint32)


# SWAR population count: LLVM turns it into one popcnt instruction
_PAIRS, _NIBBLES, _BYTES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_SUM, _1, _2, _4, _56 = np.uint64(0x0101010101010101), np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)


@njit(**KERNEL)
def rank_eligible(words_W: NDArray[np.uint64], ranks_W: NDArray[np.uint32], position: int) -> np.int64:
    """Return the eligible documents before `position`."""
    word = words_W[position >> 6] & ((_1 << np.uint64(position & 63)) - _1)
    word = word - ((word >> _1) & _PAIRS)
    word = (word & _NIBBLES) + ((word >> _2) & _NIBBLES)
    word = (word + (word >> _4)) & _BYTES
    return np.int64(ranks_W[position >> 6]) + np.int64((word * _SUM) >> _56)


@njit(**KERNEL)
def count_eligible(words_W: NDArray[np.uint64], ranks_W: NDArray[np.uint32], lo: int, hi: int) -> np.int64:
    """Return the eligible documents in `[lo, hi)`."""
    count: np.int64 = rank_eligible(words_W, ranks_W, hi) - rank_eligible(words_W, ranks_W, lo)
    return count
