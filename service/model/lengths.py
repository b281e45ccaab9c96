"""Semantic IDs of variable length: which of the chosen codes a document keeps, and at which level each of them stands.

Letters: N documents, L levels, K codes of a level, T tokens (sum of all K), R dropped tokens, P paths.

A quantizer always chooses L codes. Its length rule, up to three integer tensors beside the codebooks, makes of them
what the index stores:

| tensor | shape | what it says |
|---|---|---|
| `length_rule.order` | (L,) | the i-th choice is the code of level `order[i]` (without it: of level i) |
| `length_rule.continued` | (P, L - 1) | paths, tokens padded with -1: a SID goes on behind these and ends elsewhere |
| `length_rule.dropped` | (R,) | tokens that are left out of every SID |

They are applied in this order. The rule knows paths, not documents, so that new documents get SIDs by the same rule.
Without dropped tokens no SID is the beginning of another one: whether a path goes on depends on the path alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int32]

ORDER, CONTINUED, DROPPED = "length_rule.order", "length_rule.continued", "length_rule.dropped"
NAMES = frozenset((ORDER, CONTINUED, DROPPED))


class QuantizerError(ValueError):
    """A quantizer that cannot be made or used as asked; the message gives the numbers and the remedy."""


@dataclass(frozen=True, eq=False)
class LengthRule:
    """A checked rule; `read_rule` makes it.

    Attributes:
        level_sizes: K of each level, as the SIDs have them.
        order: the level of each choice.
        keeps_T: (T,) bool, False for tokens that are left out.
        continued: for every length 1 to L - 1, the sorted keys of the paths that go on; None when all do. The key of a
            path is (place of the path before it) · K + code.
    """

    level_sizes: tuple[int, ...]
    order: tuple[int, ...]
    keeps_T: NDArray[np.bool_]
    continued: tuple[NDArray[np.int64], ...] | None

    def arrange(self, chosen_NL: NDArray[np.integer[Any]]) -> Codes:
        """Return the codes (N, L) int32 by level, -1 where a document has none, of the codes as they were chosen."""
        codes_NL = np.empty(chosen_NL.shape, np.int32)
        codes_NL[:, self.order] = chosen_NL
        if self.continued is not None:
            self._cut(codes_NL, self.continued)
        if not self.keeps_T.all():
            offsets_L = level_offsets(self.level_sizes)
            codes_NL[~self.keeps_T[np.maximum(codes_NL, 0) + offsets_L]] = -1
        return codes_NL

    def _cut(self, codes_NL: Codes, continued: tuple[NDArray[np.int64], ...]) -> None:
        """End every path behind which none goes on, in place."""
        path_N, alive_N = np.zeros(len(codes_NL), np.int64), np.ones(len(codes_NL), np.bool_)
        for level, keys_X in enumerate(continued):
            place_N, found_N = _find(keys_X, path_N * self.level_sizes[level] + codes_NL[:, level])
            alive_N &= found_N
            codes_NL[~alive_N, level + 1] = -1
            path_N = np.where(alive_N, place_N, 0)


def read_rule(tensors: Mapping[str, NDArray[Any]], level_sizes: Sequence[int]) -> LengthRule:
    """Read the length rule among a quantizer's tensors; without its tensors all codes are kept as chosen.

    Raises:
        QuantizerError: a tensor of another shape or type, tokens that their level does not have, an order that is no
            permutation, or a path that goes on though its beginning ends.
    """
    sizes, levels = tuple(level_sizes), len(level_sizes)
    order = _integers(tensors.get(ORDER, np.arange(levels)), ORDER, (levels,)).tolist()
    if sorted(order) != list(range(levels)):
        raise QuantizerError(f"{ORDER} is {order}, must name each of {levels} levels once: export the model again")
    dropped_R = _integers(tensors.get(DROPPED, np.zeros(0, np.int32)), DROPPED, (None,))
    if dropped_R.size and (dropped_R.min() < 0 or dropped_R.max() >= sum(sizes)):
        raise QuantizerError(
            f"{DROPPED} holds tokens {dropped_R.min()} to {dropped_R.max()}, the quantizer has {sum(sizes)}: "
            "export the model again"
        )
    keeps_T = np.ones(sum(sizes), np.bool_)
    keeps_T[dropped_R] = False
    continued = _continued(tensors[CONTINUED], sizes) if CONTINUED in tensors else None
    whole = [keeps_K.all() for keeps_K in np.split(keeps_T, level_offsets(sizes)[1:])]
    if not any(whole if continued is None else whole[:1]):
        raise QuantizerError(f"{DROPPED} leaves some document without any token: export the model again")
    return LengthRule(sizes, tuple(order), keeps_T, continued)


def level_offsets(level_sizes: Sequence[int]) -> NDArray[np.int32]:
    """Return the first token of every level, (L,) int32."""
    return np.cumsum([0, *level_sizes[:-1]]).astype(np.int32)


def pack(codes_NL: Codes, level_sizes: Sequence[int]) -> Codes:
    """Return the tokens (N, L) of codes by level: level offset + code, packed to the left, padded with -1."""
    present_NL = codes_NL >= 0
    tokens_NL = np.where(present_NL, codes_NL + level_offsets(level_sizes), np.int32(-1))
    if present_NL.all():
        return tokens_NL
    order_NL = np.argsort(~present_NL, axis=1, kind="stable")
    return np.take_along_axis(tokens_NL, order_NL, axis=1)


def unpack(tokens_NL: NDArray[np.integer[Any]], level_sizes: Sequence[int]) -> Codes:
    """Return the codes (N, L) int32 of tokens (N, any width), each at the level that its token says, -1 elsewhere.

    Raises:
        QuantizerError: a token that no level has, or two tokens of a row that are not of ascending levels.
    """
    offsets_L, total = level_offsets(level_sizes), sum(level_sizes)
    if tokens_NL.size and (tokens_NL.min() < -1 or tokens_NL.max() >= total):
        raise QuantizerError(
            f"the quantizer has tokens 0 to {total - 1}, got {tokens_NL.min()} to {tokens_NL.max()}: "
            "use the semantic IDs of this model"
        )
    codes_NL = np.full((len(tokens_NL), len(level_sizes)), -1, np.int32)
    before_N = np.full(len(tokens_NL), -1)
    for tokens_N in tokens_NL.T:
        rows = np.flatnonzero(tokens_N >= 0)
        used = tokens_N[rows]
        levels = np.searchsorted(offsets_L, used, side="right") - 1
        if (wrong := levels <= before_N[rows]).any():
            row, level = int(rows[np.argmax(wrong)]), int(levels[np.argmax(wrong)])
            raise QuantizerError(
                f"row {row} is {tokens_NL[row].tolist()}, and level {level} has tokens {offsets_L[level]} to "
                f"{offsets_L[level] + level_sizes[level] - 1}: a SID has at most one token a level, in their order"
            )
        codes_NL[rows, levels] = used - offsets_L[levels]
        before_N[rows] = levels
    return codes_NL


def _continued(tokens: NDArray[Any], sizes: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """Return the sorted keys of the continued paths of every length."""
    table_PL = _integers(tokens, CONTINUED, (None, len(sizes) - 1))
    offsets_L, present_PL = level_offsets(sizes), table_PL >= 0
    codes_PL = table_PL - offsets_L[:-1]
    outside_PL = present_PL & ((codes_PL < 0) | (codes_PL >= np.asarray(sizes[:-1])))
    if outside_PL.any() or (present_PL[:, 1:] > present_PL[:, :-1]).any() or not present_PL[:, :1].all():
        raise QuantizerError(f"{CONTINUED} holds rows that are no paths of levels {list(sizes)}: export it again")
    length_P, path_P = present_PL.sum(axis=1), np.zeros(len(table_PL), np.int64)
    keys = []
    for level, size in enumerate(sizes[:-1]):
        keys_P = path_P * size + codes_PL[:, level]
        keys.append(np.unique(keys_P[length_P == level + 1]))
        longer = np.flatnonzero(length_P > level + 1)
        path_P[longer], found = _find(keys[-1], keys_P[longer])
        if not found.all():
            row = table_PL[longer[np.argmin(found)]].tolist()
            raise QuantizerError(f"{CONTINUED} goes on behind {row}, but not behind its beginning: export it again")
    return tuple(keys)


def _find(keys_X: NDArray[np.int64], wanted_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the places of keys among sorted ones, and which of them are there."""
    if not len(keys_X):
        return np.zeros(len(wanted_N), np.int64), np.zeros(len(wanted_N), np.bool_)
    place_N = np.minimum(np.searchsorted(keys_X, wanted_N), len(keys_X) - 1)
    return place_N, keys_X[place_N] == wanted_N


def _integers(tensor: NDArray[Any], name: str, shape: tuple[int | None, ...]) -> NDArray[np.int64]:
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or not np.issubdtype(tensor.dtype, np.integer):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise QuantizerError(f"{name} is {tensor.dtype} {tensor.shape}, must be integers ({wanted}): export it again")
    return tensor.astype(np.int64)
