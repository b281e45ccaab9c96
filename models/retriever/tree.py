"""The code tree of a training corpus as tensors: the service's own trie and regions, with gradients into queries.

Legend: B pairs of a batch, N documents, L levels, M trie nodes, T tokens, C children of a node (padded), D vector
dimensions, X rows of regions, G regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from numpy.typing import NDArray
from torch import Tensor

from service.index.regions import Regions, build_regions
from service.index.trie import Trie, build_trie, node_ends, spans

NO_CHILD = -1


@dataclass(frozen=True)
class CodeTree:
    """All SIDs of a training corpus as the walk sees them, on one device.

    Attributes:
        trie, regions, order: what the service would build, and the document at each of its positions.
        sids: (N, L) tokens padded with -1, in the corpus' order.
        path: (N, L + 1) the nodes of every document from the root on, NO_CHILD behind the last: a node with one SID is
            the last, since what follows is certain.
        spans: for every depth the tokens [lo, hi) of the levels that stand there.
        follow: (T + 1, T) which tokens follow a token anywhere (row T: which come first).
        child_start, token, lo, end: the trie's arrays: children, tokens, documents of every node.
        region: (M), rows: (X, D), rest: (G), region_of_row: (X), centre_row: (G): the regions.
        vectors: (N, D) in the trie's order.
        most: documents of the largest node without a region.
    """

    trie: Trie
    regions: Regions
    order: NDArray[np.int64]
    sids: Tensor
    path: Tensor
    spans: Sequence[tuple[int, int]]
    follow: Tensor
    child_start: Tensor
    token: Tensor
    lo: Tensor
    end: Tensor
    region: Tensor
    rows: Tensor
    rest: Tensor
    region_of_row: Tensor
    centre_row: Tensor
    vectors: Tensor
    most: int


@dataclass(frozen=True)
class Nearness:
    """A batch of query vectors against the whole corpus.

    `cosine` (B, N) in the trie's order, `reach` (B, G) of the regions, and `mass` (B, N + 1) float64: running sums of
    exp(cosine / temperature), so that a node's share of the dense retriever's posterior is a difference of two.
    """

    cosine: Tensor
    reach: Tensor
    mass: Tensor

    def of(self, rows: Tensor) -> Nearness:
        """Keep some pairs of the batch."""
        return Nearness(self.cosine[rows], self.reach[rows], self.mass[rows])


def build_tree(
    sids_NL: NDArray[np.int64], vectors_ND: NDArray[np.float32], level_offsets: Sequence[int], device: str
) -> CodeTree:
    """Build the tree of SIDs over unit vectors.

    Args:
        sids_NL: (N, L) tokens padded with -1, in the corpus' order.
        vectors_ND: in the corpus' order.
        level_offsets: (L + 1,) the first token of every level, then their number.
        device: of the tensors.
    """
    trie, order = build_trie(sids_NL.astype(np.int32))
    vectors = np.ascontiguousarray(vectors_ND[order], np.float32)
    regions = build_regions(trie, vectors)
    ends, path = node_ends(trie).astype(np.int64), _paths(trie, order, sids_NL.shape[1])

    def tensor(array: NDArray[np.generic], dtype: type[np.generic] = np.int64) -> Tensor:
        return torch.as_tensor(np.asarray(array, dtype), device=device)

    sizes = np.diff(regions.start_C)
    return CodeTree(
        trie=trie,
        regions=regions,
        order=order,
        sids=tensor(sids_NL),
        path=tensor(path),
        spans=spans(sids_NL, level_offsets),
        follow=torch.as_tensor(_follows(sids_NL, level_offsets[-1]), device=device),
        child_start=tensor(trie.child_M),
        token=tensor(trie.token_M),
        lo=tensor(trie.lo_M),
        end=tensor(ends),
        region=tensor(regions.region_M),
        rows=tensor(regions.rows_RD, np.float32),
        rest=tensor(regions.rest_C, np.float32),
        region_of_row=tensor(np.repeat(np.arange(regions.count), sizes)),
        centre_row=tensor(regions.start_C[:-1]),
        vectors=tensor(vectors, np.float32),
        most=int((ends - trie.lo_M)[regions.region_M < 0].max(initial=1)),
    )


def _paths(trie: Trie, order: NDArray[np.int64], levels: int) -> NDArray[np.int64]:
    """The nodes of every document, from the root on."""
    path = np.full((len(order), levels + 1), NO_CHILD, np.int64)
    ends = node_ends(trie)
    starts = trie.level_start
    for depth, (first, last) in enumerate(pairwise(starts)):
        for node in range(first, last):
            path[order[int(trie.lo_M[node]) : int(ends[node])], depth] = node
    return path


def _follows(sids_NL: NDArray[np.int64], tokens: int) -> NDArray[np.bool_]:
    follow = np.zeros((tokens + 1, tokens), bool)
    follow[tokens, sids_NL[:, 0]] = True
    for before, after in zip(sids_NL.T[:-1], sids_NL.T[1:], strict=True):
        both = after >= 0
        follow[before[both], after[both]] = True
    return follow


def children(tree: CodeTree, parents_B: Tensor) -> tuple[Tensor, Tensor]:
    """Node numbers (B, C) of the children of each parent, and a mask of those that exist."""
    start, end = tree.child_start[parents_B], tree.child_start[parents_B + 1]
    width = max(1, int((end - start).max()))
    nodes_BC = start[:, None] + torch.arange(width, device=start.device)
    exists_BC = nodes_BC < end[:, None]
    return torch.where(exists_BC, nodes_BC, start[:, None].clamp_max(len(tree.token) - 1)), exists_BC


def measure(tree: CodeTree, vector_BD: Tensor, temperature: float = 0.05) -> Nearness:
    """Meet every document and every region once; what the levels then need is looked up."""
    cosine_BN = vector_BD @ tree.vectors.T
    with torch.no_grad():
        share_BN = torch.softmax(cosine_BN.double() / temperature, dim=1)
        mass_BN = F.pad(share_BN.cumsum(1), (1, 0))
    products_BX = vector_BD @ tree.rows.T
    variance_BG = tree.rest.expand(len(vector_BD), -1).index_add(1, tree.region_of_row, products_BX**2)
    centre_BG = products_BX[:, tree.centre_row]
    reach_BG = centre_BG + (variance_BG - centre_BG**2).clamp_min(1e-12).sqrt()
    return Nearness(cosine_BN, reach_BG, mass_BN)


def reaches(tree: CodeTree, nodes_BC: Tensor, near: Nearness) -> Tensor:
    """How near the best document under each node is (B, C): `service.index.regions`, with gradients."""
    last_BC = tree.end[nodes_BC] - 1
    best_BC = near.cosine.gather(1, tree.lo[nodes_BC])
    for place in range(1, tree.most):
        document_BC = (tree.lo[nodes_BC] + place).minimum(last_BC)
        best_BC = best_BC.maximum(near.cosine.gather(1, document_BC))
    if not len(tree.rest):
        return best_BC
    region_BC = tree.region[nodes_BC]
    return torch.where(region_BC >= 0, near.reach.gather(1, region_BC.clamp_min(0)), best_BC)


def shares(tree: CodeTree, nodes_BC: Tensor, exists_BC: Tensor, near: Nearness) -> Tensor:
    """The children's shares (B, C) of what the dense retriever believes, P(document | query) = softmax(cosine / τ)."""
    mass_BC = near.mass.gather(1, tree.end[nodes_BC]) - near.mass.gather(1, tree.lo[nodes_BC])
    mass_BC = mass_BC.clamp_min(1e-30).masked_fill(~exists_BC, 0)
    return (mass_BC / mass_BC.sum(1, keepdim=True)).float()
