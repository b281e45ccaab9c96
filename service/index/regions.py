"""Regions: where the documents under a trie node lie, so that a walk can tell how near the best of them may be.

Legend: N documents, D dimensions, M nodes, C regions, R stored rows, n documents of one node, r axes of one region.

The cosines of a query with n documents have a mean and a standard deviation in the query's direction; the largest of n
such numbers is expected about sqrt(2 ln n) standard deviations above the mean. A region keeps what that takes:

    reach(query) = query · centre + sqrt(rest + sum of (query · axis)^2)

centre is the plain mean of the vectors. The axes are their principal directions, scaled by the standard deviation along
each and by OPTIMISM · sqrt(2 ln n); rest is the mean variance of all other directions, scaled alike. A leaf, and
a node with at most `HANDFUL` documents, have none: their reach is the cosine of their best document, whose vectors lie
side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from service.index.trie import Trie, node_ends

HANDFUL = 8
MOST_AXES = 16  # of a region; below 16 · HANDFUL documents one axis for every HANDFUL
OPTIMISM = 1.2  # 1 is the theory's; 1 to 1.4 found most on tldr and squad-dev
WINDOW = 65_536  # documents read at a time


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of a trie's nodes.

    Attributes:
        rows_RD: (R, D) float32; of each region its centre, then its scaled axes.
        start_C: (C + 1,) int64, each region's first row, then R.
        rest_C: (C,) float32, at least 0.
        region_M: (M,) int32, each node's region, -1 for leaves and for nodes with at most `HANDFUL` documents.
    """

    rows_RD: NDArray[np.float32]
    start_C: NDArray[np.int64]
    rest_C: NDArray[np.float32]
    region_M: NDArray[np.int32]

    @property
    def count(self) -> int:
        """How many regions there are."""
        return len(self.rest_C)

    @classmethod
    def none(cls, nodes: int, dimensions: int) -> Regions:
        """No regions at all, for walks that look at no vectors."""
        return cls(
            np.zeros((0, dimensions), np.float32), np.zeros(1, np.int64), np.zeros(0, np.float32),
            np.full(nodes, -1, np.int32),
        )  # fmt: skip


def build_regions(
    trie: Trie, vectors_ND: NDArray[np.float32], advance: Callable[[int], None] = lambda _: None
) -> Regions:
    """Measure every inner node that holds more than a handful of documents.

    Args:
        trie: the trie of the documents.
        vectors_ND: (N, D) float32 unit vectors in depth-first order; may be a memory map, read once per depth.
        advance: told how many documents were measured, up to once per document and depth.

    Returns:
        The regions; a chain (a node whose only child holds the same documents) shares one.

    Raises:
        ValueError: the vectors are not those of the trie's documents.
    """
    if vectors_ND.ndim != 2 or len(vectors_ND) != trie.documents or vectors_ND.dtype != np.float32:
        raise ValueError(
            f"vectors are {vectors_ND.dtype} of shape {vectors_ND.shape}, the trie has {trie.documents} documents: "
            "one float32 row per document"
        )
    ends_M = node_ends(trie)
    region_M, count = _number_regions(trie.lo_M, ends_M, trie.child_M, HANDFUL)
    owners = np.unique(region_M, return_index=True)[1][-count:] if count else np.zeros(0, np.int64)
    sizes_C = ends_M[owners].astype(np.int64) - trie.lo_M[owners]
    axes_C = np.minimum.reduce([np.full(count, MOST_AXES), sizes_C // HANDFUL, np.full(count, vectors_ND.shape[1])])
    start_C = np.concatenate([np.zeros(1, np.int64), np.cumsum(1 + axes_C)])
    rows_RD, rest_C = np.empty((start_C[-1], vectors_ND.shape[1]), np.float32), np.empty(count, np.float32)
    for region, node in enumerate(owners):
        rows = slice(start_C[region], start_C[region + 1])
        rows_RD[rows], rest_C[region] = measure_region(vectors_ND[trie.lo_M[node] : ends_M[node]], int(axes_C[region]))
        advance(int(sizes_C[region]))
    return Regions(rows_RD, start_C, rest_C, region_M)


def measure_region(vectors_nD: NDArray[np.float32], axes: int) -> tuple[NDArray[np.float64], float]:
    """Return the rows (1 + r, D) of a region, centre first, and its rest; all sums are float64."""
    n, dimensions = vectors_nD.shape
    windows = [slice(start, start + WINDOW) for start in range(0, n, WINDOW)]
    centre_D = sum(vectors_nD[window].sum(axis=0, dtype=np.float64) for window in windows) / n
    factor = OPTIMISM**2 * 2 * np.log(n)
    if n <= dimensions:  # the same axes out of the smaller of two square matrices
        apart_nD = vectors_nD.astype(np.float64) - centre_D
        variances, sides = np.linalg.eigh(apart_nD @ apart_nD.T / n)
        axes_rD = sides[:, -axes:].T @ apart_nD / np.sqrt(n)
    else:
        spread_DD = np.zeros((dimensions, dimensions))
        for window in windows:
            apart_nD = vectors_nD[window].astype(np.float64) - centre_D
            spread_DD += apart_nD.T @ apart_nD / n
        variances, directions = np.linalg.eigh(spread_DD)
        axes_rD = (directions[:, -axes:] * np.sqrt(np.maximum(variances[-axes:], 0))).T
    others = max(dimensions - axes, 1)
    rest = factor * max(float(variances[:-axes].sum()), 0.0) / others
    return np.concatenate([centre_D[None], np.sqrt(factor) * axes_rD[::-1]]), rest


@njit(cache=True, nogil=True)
def _number_regions(
    lo_M: NDArray[Any], ends_M: NDArray[Any], child_M: NDArray[Any], handful: int
) -> tuple[NDArray[np.int32], int]:
    """Give every inner node with more than a handful a region; an inner child with all of its parent's shares it."""
    nodes = len(lo_M)
    region_M = np.full(nodes, -1, np.int32)
    regions = 0
    for node in range(nodes):
        size = np.int64(ends_M[node]) - np.int64(lo_M[node])
        if size > handful and region_M[node] < 0 and child_M[node + 1] > child_M[node]:
            region_M[node] = regions
            regions += 1
        first = child_M[node]
        chained = child_M[node + 1] - first == 1 and lo_M[first] == lo_M[node]
        if chained and child_M[first + 1] > child_M[first]:
            region_M[first] = region_M[node]
    return region_M, regions
