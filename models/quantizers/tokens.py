"""Codes and tokens: two ways to write a semantic ID.

Shapes: N documents, L levels.

Codes are (N, L), column l for level l, -1 where a document has no code at that level (variable length).
Tokens are what the service reads: level offset + code, packed to the left, -1 padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CodeArray = NDArray[np.int32]


def codes_to_tokens(codes: CodeArray, level_sizes: Sequence[int]) -> CodeArray:
    """Turn codes (N, L) into tokens (N, L) int32: level offset + code, left-packed, padded with -1."""
    offsets = np.concatenate([[0], np.cumsum(level_sizes)[:-1]])
    tokens = np.where(codes >= 0, codes + offsets, -1)
    order = np.argsort(tokens < 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1).astype(np.int32)


def tokens_to_codes(tokens: CodeArray, level_sizes: Sequence[int]) -> CodeArray:
    """Turn tokens (N, any width) back into codes (N, L) int32, -1 at levels that a document does not use."""
    ends = np.cumsum(level_sizes)
    codes = np.full((len(tokens), len(level_sizes)), -1, dtype=np.int32)
    rows, columns = np.nonzero(tokens >= 0)
    used = tokens[rows, columns]
    levels = np.searchsorted(ends, used, side="right")
    codes[rows, levels] = used - (ends - np.asarray(level_sizes))[levels]
    return codes
