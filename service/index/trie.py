"""The trie over all semantic IDs of an index: one CSR, numbered breadth-first, over documents in depth-first order.

Legend: N documents, L levels, M nodes (node 0 is the root), T tokens.

Children of node n are nodes `child[n] .. child[n + 1]`, in token order. A node covers the documents `[lo, end)`; its
end is its next sibling's `lo`, or its parent's end for the last sibling. Documents whose SID ends at an inner node come
first in its range. A node whose range holds one distinct SID is finished: it has no children, the rest of its path is
in `sids.npy`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.index import trie_kernels as kernels
from service.index.arrays import write_array

MAX_LEVELS = 200  # shared-prefix lengths are kept in one byte
MAX_DOCUMENTS = 2**32 - 2  # positions and nodes are uint32
UINT16_PADDING = 65535

FILES = {
    "token_M": "trie_token.npy",
    "lo_M": "trie_lo.npy",
    "child_M": "trie_child.npy",
    "sids_NL": "sids.npy",
}


@dataclass(frozen=True, eq=False)
class Trie:
    """All semantic IDs, prefix by prefix.

    Attributes:
        token_M: (M,) uint16 or int32, the token that leads into each node; 0 for the root.
        lo_M: (M,) uint32, the first document of each node.
        child_M: (M + 1,) uint32, the first child of each node; `child_M[M] == M`.
        sids_NL: (N, L) tokens of every document in depth-first order, uint16 (padding 65535) or int32 (padding -1).
        level_start: the first node of every depth, then M.
    """

    token_M: NDArray[Any]
    lo_M: NDArray[np.uint32]
    child_M: NDArray[np.uint32]
    sids_NL: NDArray[Any]
    level_start: tuple[int, ...]

    @property
    def nodes(self) -> int:
        """The number of nodes, the root included."""
        return len(self.lo_M)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.sids_NL)

    @property
    def depth(self) -> int:
        """The depth of the deepest node: 0 when all documents share one SID."""
        return len(self.level_start) - 2

    def sid(self, position: int) -> tuple[int, ...]:
        """Return the tokens of the document at `position`, without padding."""
        padding = padding_of(self.sids_NL.dtype)
        return tuple(token for token in self.sids_NL[position].tolist() if token != padding)


def padding_of(dtype: np.dtype[Any]) -> int:
    """Return the value that pads rows of `sids.npy` of this dtype: 65535 for uint16, else -1."""
    return UINT16_PADDING if dtype == np.uint16 else -1


def spans(sids_NL: NDArray[Any], level_offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Return the tokens [lo, hi) that a step may write, for every depth that some SID reaches.

    These are the tokens of the depth's own level, unless SIDs leave out levels: then of all levels, from the first to
    the last, that some SID has at this depth.

    Args:
        sids_NL: (N, L) tokens, rows padded at the end.
        level_offsets: (L + 1,) the first token of every level, then their number.
    """
    padding, found = padding_of(sids_NL.dtype), []
    for column_N in sids_NL.T:
        written_N = column_N[column_N != padding]
        if not len(written_N):
            break
        first, last = (bisect_right(level_offsets, int(token)) - 1 for token in (written_N.min(), written_N.max()))
        found.append((level_offsets[first], level_offsets[last + 1]))
    return found


def build_trie(sids: NDArray[Any]) -> tuple[Trie, NDArray[np.int64]]:
    """Sort semantic IDs and build their trie.

    Args:
        sids: (N, L) integers, the tokens of each document, rows padded with -1 at the end.

    Returns:
        The trie, and order (N,) int64: `order[i]` is the input row at depth-first position i. Rows with one SID keep
        their order.

    Raises:
        ValueError: the array is no such table of tokens; the message names the first bad row.

    Costs L counting passes over N rows: about two seconds for 10 million SIDs of five levels on one core.
    """
    _check_sids(sids)
    dtype = np.uint16 if int(sids.max()) < UINT16_PADDING else np.int32
    sids_NL = sids.astype(dtype)  # -1 wraps to 65535 in uint16, which is the padding there
    order_N = _lexicographic_order(sids_NL)
    sids_NL = sids_NL[order_N]
    padding = padding_of(sids_NL.dtype)
    shared_N = kernels.shared_prefixes(sids_NL)
    counts = kernels.count_nodes(sids_NL, shared_N, padding)
    level_start = _level_starts(counts)
    token_M, lo_M, child_M = kernels.fill_nodes(sids_NL, shared_N, padding, np.array(level_start, np.int64))
    return Trie(token_M, lo_M, child_M, sids_NL, level_start), order_N


def collision_sizes(sids_NL: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of documents of every distinct SID of sorted rows."""
    starts = np.flatnonzero(np.r_[True, (sids_NL[1:] != sids_NL[:-1]).any(axis=1)])
    sizes: NDArray[np.int64] = np.diff(np.r_[starts, len(sids_NL)])
    return sizes


def node_ends(trie: Trie) -> NDArray[np.uint32]:
    """Return the end of every node's document range, (M,) uint32."""
    ends: NDArray[np.uint32] = kernels.fill_ends(trie.lo_M, trie.child_M, trie.documents)
    return ends


def save_trie(trie: Trie, folder: Path) -> None:
    """Write the trie's four arrays as `.npy` files into `folder`."""
    for attribute, name in FILES.items():
        write_array(folder / name, getattr(trie, attribute))


def open_trie(folder: Path) -> Trie:
    """Open a saved trie by memory map, in a time that does not depend on its size.

    Raises:
        ValueError: a file has another shape or dtype than the others ask for; the message names it. The nodes
            themselves are checked by `verify_trie`.
        OSError: a file is missing or is no `.npy` file.
    """
    arrays = {key: np.load(folder / name, mmap_mode="r", allow_pickle=False) for key, name in FILES.items()}
    _check_layout(arrays)
    return Trie(**arrays, level_start=_find_levels(arrays["child_M"]))


def verify_trie(trie: Trie, tokens: int) -> None:
    """Check every node and every token, so that no kernel can leave its arrays.

    Args:
        trie: the trie to check.
        tokens: T, the number of tokens of the model.

    Raises:
        ValueError: what is wrong, and where. Costs one pass over all arrays.
    """
    child, lo = trie.child_M, trie.lo_M
    node = np.arange(trie.nodes, dtype=np.int64)
    is_ordered = child[0] == 1 and not (child[1:] < child[:-1]).any() and not (child[:-1] <= node).any()
    if not is_ordered or trie.level_start[-1] != trie.nodes:
        raise ValueError(f"{FILES['child_M']}: the children are not numbered breadth-first: build the bundle again")
    ends = node_ends(trie)
    if (lo >= ends).any() or (ends > trie.documents).any():
        bad = int(np.argmax((lo >= ends) | (ends > trie.documents)))
        raise ValueError(
            f"{FILES['lo_M']}: node {bad} covers documents [{lo[bad]}, {ends[bad]}) of {trie.documents}: "
            "build the bundle again"
        )
    parents = np.flatnonzero(child[1:] > child[:-1])
    if (early := lo[child[parents]] < lo[parents]).any():
        bad = int(parents[np.argmax(early)])
        raise ValueError(
            f"{FILES['lo_M']}: node {child[bad]} begins at document {lo[child[bad]]}, before its parent {bad} at "
            f"{lo[bad]}: build the bundle again"
        )
    if trie.depth > trie.sids_NL.shape[1]:
        raise ValueError(
            f"{FILES['child_M']}: the nodes are {trie.depth} deep, {FILES['sids_NL']} has {trie.sids_NL.shape[1]} "
            "levels: build the bundle again"
        )
    _check_siblings(trie)
    _check_tokens(trie, tokens)


def _check_siblings(trie: Trie) -> None:
    """Refuse a node whose children's tokens do not ascend: scratch arrays hold one entry for every token."""
    follows_M = np.ones(trie.nodes + 1, np.bool_)
    follows_M[trie.child_M] = False  # the first child of some node
    ascends_M = trie.token_M[1:] > trie.token_M[:-1]
    if not (ascends_M | ~follows_M[1:-1]).all():
        bad = 1 + int(np.argmin(ascends_M | ~follows_M[1:-1]))
        raise ValueError(f"{FILES['token_M']}: node {bad} repeats a token, or is out of order: build the bundle again")


def _check_tokens(trie: Trie, tokens: int) -> None:
    """Refuse tokens that the model does not have."""
    used = trie.sids_NL != padding_of(trie.sids_NL.dtype)
    largest = max(int(np.max(trie.sids_NL, where=used, initial=0)), int(trie.token_M.max()))
    smallest = min(int(np.min(trie.sids_NL, where=used, initial=0)), int(trie.token_M.min()))
    if largest >= tokens or smallest < 0:
        raise ValueError(
            f"the trie uses tokens {smallest} to {largest}, the model has 0 to {tokens - 1}: "
            "index the corpus with this model"
        )
    if not used[:, 0].all() or (used[:, 1:] > used[:, :-1]).any():
        raise ValueError(f"{FILES['sids_NL']}: a row is empty or has tokens behind its padding: build the bundle again")


def _check_sids(sids: NDArray[Any]) -> None:
    """Refuse what is no (N, L) table of tokens padded with -1 at the end of its rows."""
    if sids.ndim != 2 or not np.issubdtype(sids.dtype, np.integer):
        raise ValueError(f"semantic IDs are an (N, L) array of integers, not {sids.dtype} of shape {sids.shape}")
    documents, levels = sids.shape
    if not 1 <= documents <= MAX_DOCUMENTS or not 1 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"{documents} documents of {levels} levels: a trie holds 1 to {MAX_DOCUMENTS} of 1 to {MAX_LEVELS} levels"
        )
    if sids.min() < -1 or sids.max() > np.iinfo(np.int32).max - 2:
        raise ValueError(f"tokens range from {sids.min()} to {sids.max()}: from 0, or -1 as padding, to 2^31 - 3")
    present = sids >= 0
    bad = ~present[:, 0] | (present[:, 1:] > present[:, :-1]).any(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row} is {sids[row].tolist()}: a SID has at least one token and -1 only at its end")


def _lexicographic_order(sids_NL: NDArray[Any]) -> NDArray[np.int64]:
    """Sort rows by a stable counting pass per level, the last level first; padding sorts before every token."""
    order_N = np.arange(len(sids_NL), dtype=np.int64)
    padding = padding_of(sids_NL.dtype)
    for level in reversed(range(sids_NL.shape[1])):
        column_N = np.ascontiguousarray(sids_NL[:, level])
        order_N = kernels.sort_by_column(column_N, order_N, padding)
    return order_N


def _level_starts(counts: NDArray[np.int64]) -> tuple[int, ...]:
    """Turn nodes per depth into the first node of each depth that has nodes, then M."""
    used = counts[: int(np.count_nonzero(counts))]  # depths without nodes are all at the end
    return (0, *(int(start) for start in np.cumsum(used)))


def _find_levels(child_M: NDArray[np.uint32]) -> tuple[int, ...]:
    """Find the first node of each depth: the first child of the first node of the depth above."""
    starts, nodes = [0], len(child_M) - 1
    while starts[-1] < nodes:
        following = int(child_M[starts[-1]])
        if following <= starts[-1] or following > nodes:
            raise ValueError(f"{FILES['child_M']}: depth {len(starts)} starts at node {following} of {nodes}")
        starts.append(following)
    return tuple(starts)


def _check_layout(arrays: dict[str, NDArray[Any]]) -> None:
    """Refuse arrays whose shapes or dtypes do not belong together."""
    nodes = len(arrays["lo_M"])
    tokens = (np.dtype(np.uint16), np.dtype(np.int32))
    wanted: dict[str, tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]] = {
        "token_M": ((nodes,), tokens),
        "lo_M": ((nodes,), (np.dtype(np.uint32),)),
        "child_M": ((nodes + 1,), (np.dtype(np.uint32),)),
        "sids_NL": (arrays["sids_NL"].shape[:2], (arrays["token_M"].dtype,)),
    }
    for key, (shape, dtypes) in wanted.items():
        array = arrays[key]
        if array.shape != shape or array.dtype not in dtypes or not array.flags.c_contiguous or not array.size:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{FILES[key]} is {array.dtype} {array.shape}, expected {expected} of shape {shape}")
    if arrays["sids_NL"].ndim != 2 or int(arrays["child_M"][nodes]) != nodes or int(arrays["lo_M"][0]) != 0:
        raise ValueError(f"the trie's files do not belong to one trie of {nodes} nodes: build the bundle again")
