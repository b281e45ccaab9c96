"""Layout of packed binary codes: levels, Matryoshka prefixes, words.

Shapes: N documents, D dimensions, U quantised values, W words.

**Bits.** A quantised value is written as a thermometer code (QAMA eq. 22 and 23), so that the Hamming distance of
two values is the difference of their levels: 2 bit 0..3 → 000 001 011 111, 1.5 bit 0..2 → 00 01 11, 1 bit as it is.
At 0.5 bit two dimensions (2i, 2i+1) share one value of one bit (eq. 20). Bit i of word w is bit 64w + i of the code.

**Matryoshka prefixes.** The dimensions that a prefix adds to the one before it start on a word boundary (the bits left
over are zero), so the first `words_of(d)` words of a code are the code of the first d dimensions.

**Hybrid** (section 3.5) gives the first quarter of all D dimensions 2 bit, the next 1.5, 1 and 0.5. Quarters are those
of the full width, not of each prefix: the early dimensions carry the most, and dividing each prefix anew would store
some of them at half a bit. A short prefix of a hybrid code is therefore finer than 1.625 bit a dimension; the code
of the paper's tables at d dimensions is the layout whose only prefix is d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Level = Literal["0.5", "1", "1.5", "2", "hybrid"]
PlainLevel = Literal["0.5", "1", "1.5", "2"]
LEVELS: tuple[Level, ...] = get_args(Level)
WORD_BITS = 64
BITS_PER_VALUE: dict[PlainLevel, int] = {"0.5": 1, "1": 1, "1.5": 2, "2": 3}  # after eq. 22 and 23
DIMS_PER_VALUE: dict[PlainLevel, int] = {"0.5": 2, "1": 1, "1.5": 1, "2": 1}
HYBRID_QUARTERS: tuple[PlainLevel, ...] = ("2", "1.5", "1", "0.5")


class CodeError(ValueError):
    """A layout, a quantised value or a packed code is not what it should be; the text gives the numbers."""


@dataclass(frozen=True)
class Run:
    """Neighbouring dimensions `[first, last)` quantised at one level."""

    level: PlainLevel
    first: int
    last: int

    @property
    def values(self) -> int:
        """Quantised values of the run: one a dimension, or one a pair at 0.5 bit."""
        return (self.last - self.first) // DIMS_PER_VALUE[self.level]

    @property
    def bits(self) -> int:
        """Stored bits of the run."""
        return self.values * BITS_PER_VALUE[self.level]


@dataclass(frozen=True)
class CodeLayout:
    """Where a code keeps its bits; one layout serves every prefix.

    Attributes:
        level: quantisation level of all dimensions, or "hybrid".
        prefix_dims: ascending dimensions that a code may be cut to; the last is the full width D.
        prefix_words: uint64 words of each prefix.
        prefix_bits: bits of each prefix that carry information (eq. 24's n), without padding.
    """

    level: Level
    prefix_dims: tuple[int, ...]
    prefix_words: tuple[int, ...]
    prefix_bits: tuple[int, ...]

    @property
    def dims(self) -> int:
        """Full width D."""
        return self.prefix_dims[-1]

    @property
    def words(self) -> int:
        """Words W of a full code."""
        return self.prefix_words[-1]

    @property
    def bits(self) -> int:
        """Information bits of a full code."""
        return self.prefix_bits[-1]

    @property
    def values(self) -> int:
        """Quantised values U that a full code is packed from."""
        return sum(run.values for block in self.blocks() for run in block)

    def blocks(self) -> list[list[Run]]:
        """The runs of every prefix's new dimensions, one list for each prefix."""
        starts = (0, *self.prefix_dims[:-1])
        return [_runs(self.level, self.dims, first, last) for first, last in zip(starts, self.prefix_dims, strict=True)]

    def prefix_index(self, dims: int | None) -> int:
        """Position of `dims` among the prefixes (None: the full width).

        Raises:
            CodeError: the code has no such prefix.
        """
        if dims is None:
            return len(self.prefix_dims) - 1
        if dims not in self.prefix_dims:
            raise CodeError(f"{dims} dimensions are no prefix of this code: choose one of {list(self.prefix_dims)}")
        return self.prefix_dims.index(dims)

    def words_of(self, dims: int | None = None) -> int:
        """Words of the code of the first `dims` dimensions."""
        return self.prefix_words[self.prefix_index(dims)]

    def bits_of(self, dims: int | None = None) -> int:
        """Information bits of the code of the first `dims` dimensions."""
        return self.prefix_bits[self.prefix_index(dims)]


def _quarters(dims: int) -> list[Run]:
    """Hybrid quarters of the full width (section 3.5)."""
    quarter = dims // 4
    bounds = (0, quarter, 2 * quarter, 3 * quarter, dims)
    return [Run(level, bounds[i], bounds[i + 1]) for i, level in enumerate(HYBRID_QUARTERS)]


def _runs(level: Level, dims: int, first: int, last: int) -> list[Run]:
    """Runs of dimensions [first, last) of a code of `dims` dimensions."""
    whole = _quarters(dims) if level == "hybrid" else [Run(level, 0, dims)]
    cut = [Run(run.level, max(run.first, first), min(run.last, last)) for run in whole]
    return [run for run in cut if run.first < run.last]


def _check_prefixes(level: Level, prefix_dims: tuple[int, ...]) -> None:
    if not prefix_dims or prefix_dims[0] < 1 or any(a >= b for a, b in pairwise(prefix_dims)):
        raise CodeError(f"prefix dimensions must be positive and ascending, got {list(prefix_dims)}")
    if level == "hybrid" and prefix_dims[-1] % 8:
        raise CodeError(
            f"hybrid codes need a multiple of 8 dimensions (four quarters, the last of pairs), got {prefix_dims[-1]}"
        )
    starts = (0, *prefix_dims[:-1])
    for first, last in zip(starts, prefix_dims, strict=True):
        for run in _runs(level, prefix_dims[-1], first, last):
            if run.level == "0.5" and (run.first % 2 or run.last % 2):
                raise CodeError(f"0.5 bit joins pairs of dimensions: prefix {last} splits one; use even prefixes")


def code_layout(level: str, prefix_dims: Sequence[int]) -> CodeLayout:
    """Lay out the codes of one level.

    Args:
        level: one of `LEVELS`.
        prefix_dims: ascending Matryoshka dimensions, the last being the full width.

    Raises:
        CodeError: unknown level, unsorted prefixes, or prefixes that split a pair at 0.5 bit.
    """
    if level not in LEVELS:
        raise CodeError(f"unknown level {level!r}: choose one of {list(LEVELS)}")
    dims = tuple(int(d) for d in prefix_dims)
    _check_prefixes(level, dims)
    words, bits = [0], [0]
    for first, last in zip((0, *dims[:-1]), dims, strict=True):
        new_bits = sum(run.bits for run in _runs(level, dims[-1], first, last))
        bits.append(bits[-1] + new_bits)
        words.append(words[-1] + -(-new_bits // WORD_BITS))
    return CodeLayout(level, dims, tuple(words[1:]), tuple(bits[1:]))
