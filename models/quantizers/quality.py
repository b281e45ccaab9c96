"""How good a set of semantic IDs is: uniqueness, collisions, and how each level uses its codes.

Shapes: N documents, L levels, K codes of a level.

p_unique is HHQ appendix C. Entropy, Gini coefficient and standard deviation of code use, path sparsity and the split
into head and tail are the diagnosis of the Hourglass paper, sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.popularity import head_mask


class QualityError(ValueError):
    """Semantic IDs that cannot be measured: the message gives the shapes or an example."""


HEAD_SHARE = 0.2  # of the documents, those with the most interactions


@dataclass(frozen=True)
class LevelQuality:
    """How one level uses its codes.

    Attributes:
        codes: K.
        documents: how many have a code at this level.
        dead: codes that no document has.
        entropy_bits: of the code's distribution; log2(K) at best.
        entropy_share: entropy over log2(K).
        given_bits: mean entropy of the code given the one before it, from the code tree's conditional probabilities
            (HHQ section 3.3); at the first level, its own entropy.
        gini: Gini coefficient of documents a code, dead codes included: 0 even, towards 1 concentrated.
        std: standard deviation of documents a code.
        largest: documents of the most used code.
        top_tenth_share: share of documents under the most used tenth of the codes.
        prefixes: distinct paths down to this level.
        path_share: prefixes over all possible paths, or over the documents where those are fewer (1 is no sparsity).
        counts: documents of every code, most used first.
    """

    codes: int
    documents: int
    dead: int
    entropy_bits: float
    entropy_share: float
    given_bits: float
    gini: float
    std: float
    largest: int
    top_tenth_share: float
    prefixes: int
    path_share: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class GroupQuality:
    """Head or tail by interactions: size, share of interactions, documents alone on their SID, codes, cosine."""

    documents: int
    interaction_share: float
    unique_share: float
    mean_length: float
    cosine: float | None


@dataclass(frozen=True)
class SidQuality:
    """The quality of a set of semantic IDs.

    Attributes:
        documents: N.
        distinct: distinct SIDs.
        p_unique: distinct / N (HHQ, appendix C).
        alone_share: share of documents that share their SID with no other.
        collisions: number of SIDs by how many documents they hold (1: no collision).
        mean_length: mean number of codes of a SID.
        cosine: mean cosine between vectors and reconstructions, where vectors are known.
        levels: one entry a level.
        groups: "head" and "tail", where interactions are given.
    """

    documents: int
    distinct: int
    p_unique: float
    alone_share: float
    collisions: dict[int, int]
    mean_length: float
    cosine: float | None
    levels: tuple[LevelQuality, ...]
    groups: dict[str, GroupQuality]

    def as_json(self) -> dict[str, Any]:
        """Give plain values for json.dump."""
        return asdict(self)


def measure_sids(
    codes_NL: NDArray[np.integer[Any]],
    level_sizes: Sequence[int],
    cosine_N: NDArray[np.floating[Any]] | None = None,
    interactions_N: NDArray[np.integer[Any]] | None = None,
) -> SidQuality:
    """Measure semantic IDs.

    Args:
        codes_NL: (N, L) codes, -1 where a document has none at a level.
        level_sizes: K of each level.
        cosine_N: each document's cosine to its reconstruction.
        interactions_N: each document's interactions, for head and tail.

    Raises:
        QualityError: shapes that do not fit, no documents, or codes outside their level.
    """
    _check(codes_NL, level_sizes, cosine_N, interactions_N)
    prefixes_LN = _prefixes(codes_NL, level_sizes)
    holders = np.bincount(prefixes_LN[-1])
    sizes, counts = np.unique(holders, return_counts=True)
    alone_N = holders[prefixes_LN[-1]] == 1
    lengths_N = (codes_NL >= 0).sum(axis=1)
    levels = [
        _level(codes_NL[:, : level + 1], size, prefixes_LN[level], _paths(level_sizes[: level + 1], len(codes_NL)))
        for level, size in enumerate(level_sizes)
    ]
    groups = {} if interactions_N is None else _groups(interactions_N, alone_N, lengths_N, cosine_N)
    return SidQuality(
        documents=len(codes_NL),
        distinct=len(holders),
        p_unique=len(holders) / len(codes_NL),
        alone_share=float(alone_N.mean()),
        collisions={int(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        mean_length=float(lengths_N.mean()),
        cosine=None if cosine_N is None else float(cosine_N.mean()),
        levels=tuple(levels),
        groups=groups,
    )


def gini(counts: NDArray[np.integer[Any]]) -> float:
    """Give the Gini coefficient of non-negative counts: Σ (2i − n − 1) x_i / (n Σ x), x ascending (Yitzhaki 1979)."""
    ascending = np.sort(counts).astype(np.float64)
    total, n = ascending.sum(), len(ascending)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * total)) if total else 0.0


def entropy_bits(counts: NDArray[np.integer[Any]]) -> float:
    """Give the Shannon entropy of counts in bits."""
    used = counts[counts > 0].astype(np.float64)
    share = used / used.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0.0 for a single code


def conditional_bits(before_N: NDArray[np.integer[Any]], code_N: NDArray[np.integer[Any]]) -> float:
    """Give the mean entropy in bits of P(code | code before): H(both) - H(before); -1 stands for no code before."""
    pairs = np.stack([before_N, code_N], axis=1)
    both = np.unique(pairs, axis=0, return_counts=True)[1]
    alone = np.unique(before_N, return_counts=True)[1]
    return max(entropy_bits(both) - entropy_bits(alone), 0.0) if len(pairs) else 0.0


def _level(codes_Nl: NDArray[np.integer[Any]], size: int, prefixes_N: NDArray[np.int64], paths: int) -> LevelQuality:
    codes_N = codes_Nl[:, -1]
    used_N = codes_N >= 0
    counts = np.bincount(codes_N[used_N], minlength=size)
    descending = np.sort(counts)[::-1]
    documents = int(used_N.sum())
    prefixes = len(np.unique(prefixes_N[used_N]))
    entropy = entropy_bits(counts) if documents else 0.0
    return LevelQuality(
        codes=size,
        documents=documents,
        dead=int((counts == 0).sum()),
        entropy_bits=entropy,
        entropy_share=entropy / float(np.log2(size)) if size > 1 else 1.0,
        given_bits=conditional_bits(codes_Nl[used_N, -2], codes_N[used_N]) if codes_Nl.shape[1] > 1 else entropy,
        gini=gini(counts),
        std=float(counts.std()),
        largest=int(descending[0]),
        top_tenth_share=float(descending[: -(-size // 10)].sum() / max(documents, 1)),
        prefixes=prefixes,
        path_share=prefixes / paths,
        counts=tuple(int(count) for count in descending),
    )


def _prefixes(codes_NL: NDArray[np.integer[Any]], level_sizes: Sequence[int]) -> list[NDArray[np.int64]]:
    """Number the distinct paths down to every level; a level without a code leaves the path as it is."""
    numbers, prefixes = np.zeros(len(codes_NL), dtype=np.int64), []
    for level, size in enumerate(level_sizes):
        keys = numbers * (size + 1) + codes_NL[:, level] + 1
        numbers = np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)
        prefixes.append(numbers)
    return prefixes


def _paths(level_sizes: Sequence[int], documents: int) -> int:
    paths = 1
    for size in level_sizes:
        paths *= size
    return min(paths, documents)


def _groups(
    interactions_N: NDArray[np.integer[Any]],
    alone_N: NDArray[np.bool_],
    lengths_N: NDArray[np.int64],
    cosine_N: NDArray[np.floating[Any]] | None,
) -> dict[str, GroupQuality]:
    is_head_N = head_mask(interactions_N, HEAD_SHARE)
    total = max(int(interactions_N.sum()), 1)
    parts = {"head": np.flatnonzero(is_head_N), "tail": np.flatnonzero(~is_head_N)}
    return {
        name: GroupQuality(
            documents=len(rows),
            interaction_share=float(interactions_N[rows].sum() / total),
            unique_share=float(alone_N[rows].mean()),
            mean_length=float(lengths_N[rows].mean()),
            cosine=None if cosine_N is None else float(cosine_N[rows].mean()),
        )
        for name, rows in parts.items()
        if len(rows)
    }


def _check(
    codes_NL: NDArray[np.integer[Any]],
    level_sizes: Sequence[int],
    cosine_N: NDArray[np.floating[Any]] | None,
    interactions_N: NDArray[np.integer[Any]] | None,
) -> None:
    if codes_NL.ndim != 2 or 0 in codes_NL.shape or not np.issubdtype(codes_NL.dtype, np.integer):
        raise QualityError(f"semantic IDs must be whole numbers (N, L), got {codes_NL.dtype} of shape {codes_NL.shape}")
    if codes_NL.shape[1] != len(level_sizes):
        raise QualityError(f"semantic IDs have {codes_NL.shape[1]} levels, level sizes are {list(level_sizes)}")
    if min(level_sizes) < 1:
        raise QualityError(f"level sizes are {list(level_sizes)}: each must be at least 1")
    outside = (codes_NL < -1) | (codes_NL >= np.asarray(level_sizes))
    if outside.any():
        row, level = (int(i) for i in np.argwhere(outside)[0])
        raise QualityError(
            f"{int(outside.sum())} codes are outside their level, e.g. {int(codes_NL[row, level])} in row {row}, "
            f"level {level} of {level_sizes[level]}: are these tokens?"
        )
    for name, array in (("cosines", cosine_N), ("interactions", interactions_N)):
        if array is not None and array.shape != (len(codes_NL),):
            raise QualityError(f"{name} of shape {array.shape} for {len(codes_NL)} documents")
