"""Training objectives over a code tree: constrained, guided and plain next-token losses, and InfoNCE.

Legend: B pairs of a batch, L levels, N documents, M trie nodes, T tokens, C children of a node (padded), E token and
D vector dimensions.

cSFT is HHQ eq. 8-10. Guided cSFT adds the geometry of the tree to the same masked softmax: the logit of child k is
scale_l · cos(hidden, e_k) + weight_l · cos(query vector, centroid of child k), with gradients into the encoder through
both terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from numpy.typing import NDArray
from torch import Tensor

from models.retriever.network import Retriever

NO_CHILD = -1
MASKED = -1e9


@dataclass(frozen=True)
class CodeTree:
    """All SIDs of a training corpus, prefix by prefix, as tensors on one device.

    `child_start` (M+1) are CSR ranges of nodes numbered breadth-first, `token` (M) the token a node is reached by,
    `centroid` (M, D) the unit mean of the vectors under it, `path` (N, L+1) the nodes of every document from the root
    on (NO_CHILD behind the end), `follow` (T+1, T) which tokens follow a token anywhere (row T: which come first).
    """

    child_start: Tensor
    token: Tensor
    centroid: Tensor
    path: Tensor
    sids: Tensor
    follow: Tensor
    widest: int

    @property
    def root_children(self) -> slice:
        """Node numbers of the first level."""
        return slice(int(self.child_start[0]), int(self.child_start[1]))


def build_tree(sids_NL: NDArray[np.int64], vectors_ND: NDArray[np.float32], tokens: int, device: str) -> CodeTree:
    """Build the tree of SIDs (tokens, padded with -1) in plain numpy; costs O(N L log N) time and O(M D) memory."""
    n, levels = sids_NL.shape
    path = np.full((n, levels + 1), NO_CHILD, np.int64)
    path[:, 0] = 0
    token, counts, node_tokens = [np.zeros(1, np.int64)], [], []
    first = 1
    parents = np.zeros(1, np.int64)
    for level in range(levels):
        alive = np.flatnonzero((path[:, level] != NO_CHILD) & (sids_NL[:, level] >= 0))
        if not len(alive):
            break
        pairs = np.stack([path[alive, level], sids_NL[alive, level]], 1)
        unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
        path[alive, level + 1] = first + inverse.ravel()
        token.append(unique[:, 1])
        counts.append(np.bincount(unique[:, 0] - parents[0], minlength=len(parents)))
        parents = np.arange(first, first + len(unique))
        first += len(unique)
        node_tokens.append(len(unique))
    counts.append(np.zeros(len(parents), np.int64))
    child_start = np.concatenate([[1], 1 + np.cumsum(np.concatenate(counts))])
    follow = np.zeros((tokens + 1, tokens), bool)
    follow[tokens, sids_NL[:, 0]] = True
    for before, after in zip(sids_NL.T[:-1], sids_NL.T[1:], strict=True):
        both = after >= 0
        follow[before[both], after[both]] = True
    return CodeTree(
        child_start=torch.as_tensor(child_start, device=device),
        token=torch.as_tensor(np.concatenate(token), device=device),
        centroid=_centroids(torch.as_tensor(path, device=device), torch.as_tensor(vectors_ND, device=device), first),
        path=torch.as_tensor(path, device=device),
        sids=torch.as_tensor(sids_NL, device=device),
        follow=torch.as_tensor(follow, device=device),
        widest=int(np.diff(child_start).max()),
    )


def _centroids(path_NL: Tensor, vectors_ND: Tensor, nodes: int) -> Tensor:
    total = torch.zeros(nodes, vectors_ND.shape[1], device=vectors_ND.device)
    for level in path_NL.T:
        alive = level != NO_CHILD
        total.index_add_(0, level[alive], vectors_ND[alive].float())
    return F.normalize(total, dim=-1)


@dataclass(frozen=True)
class Scales:
    """Learnt scalars by token: `alone` for generative scoring, `beside` and `weight` for guided scoring, each (T)."""

    alone: Tensor
    beside: Tensor
    weight: Tensor

    @classmethod
    def of(cls, retriever: Retriever) -> Scales:
        """Spread the scales of the levels over the tokens."""
        level = retriever.level_of_token
        return cls(*(log.exp()[level] for log in (retriever.log_alone, retriever.log_beside, retriever.log_weight)))


def children(tree: CodeTree, parents_B: Tensor) -> tuple[Tensor, Tensor]:
    """Node numbers (B, C) of the children of each parent, and a mask of those that exist."""
    start, end = tree.child_start[parents_B], tree.child_start[parents_B + 1]
    width = max(1, int((end - start).max()))
    nodes_BC = start[:, None] + torch.arange(width, device=start.device)
    exists_BC = nodes_BC < end[:, None]
    return torch.where(exists_BC, nodes_BC, start[:, None].clamp_max(len(tree.token) - 1)), exists_BC


def step_losses(
    tree: CodeTree,
    level: int,
    documents_B: Tensor,
    cosine_BT: Tensor,
    vector_BD: Tensor,
    scales: Scales,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one level under cSFT: (generative, guided), each summed over the B pairs (HHQ eq. 10).

    `cosine_BT` are cosines of the hidden state with every token. Nodes with one child, and documents whose SID has
    ended, cost nothing. Label smoothing spreads `smoothing` over the children by their geometric closeness.
    """
    parent, target = tree.path[documents_B, level], tree.path[documents_B, level + 1]
    alive = target != NO_CHILD
    nodes_BC, exists_BC = children(tree, parent.clamp_min(0))
    alive &= exists_BC.sum(1) > 1
    if not bool(alive.any()):
        zero = cosine_BT.sum() * 0
        return zero, zero
    nodes_BC, exists_BC, target = nodes_BC[alive], exists_BC[alive], target[alive]
    tokens_BC = tree.token[nodes_BC]
    cosine_BC = cosine_BT[alive].gather(1, tokens_BC)
    geometry_BC = _geometry(tree, level, nodes_BC, vector_BD[alive])
    label = target - nodes_BC[:, 0]
    alone = scales.alone[tokens_BC] * cosine_BC
    guided = scales.beside[tokens_BC] * cosine_BC + scales.weight[tokens_BC] * geometry_BC
    soft = _soft_labels(tree, nodes_BC, exists_BC, target, smoothing)
    return tuple(_cross_entropy(logits, exists_BC, label, soft, smoothing) for logits in (alone, guided))  # type: ignore[return-value]  # two


def unguided_loss(
    tree: CodeTree,
    level: int,
    documents_B: Tensor,
    cosine_BT: Tensor,
    scales: Scales,
    levels_T: Tensor,
    predecessor: bool,
) -> Tensor:
    """Cross-entropy of one level, summed over pairs, without the full-prefix trie.

    `predecessor`: only tokens that follow the previous token anywhere in the corpus (HHQ eq. 8 to the letter).
    Otherwise plain next-token training over the vocabulary of the target's level.
    """
    sids_B = tree.sids[documents_B]
    target = sids_B[:, level]
    alive = target >= 0
    if predecessor:
        before = sids_B[:, level - 1] if level else torch.full_like(target, len(levels_T))
        allowed_BT = tree.follow[before.clamp_min(0)]
    else:
        allowed_BT = levels_T[None] == levels_T[target.clamp_min(0)][:, None]
    logits_BT = (scales.alone * cosine_BT).float().masked_fill(~allowed_BT, MASKED)
    losses: Tensor = F.cross_entropy(logits_BT[alive], target[alive], reduction="sum")
    return losses


def _geometry(tree: CodeTree, level: int, nodes_BC: Tensor, vector_BD: Tensor) -> Tensor:
    if level == 0:  # every pair has the same children: one matrix product
        return vector_BD @ tree.centroid[tree.root_children].T
    return torch.einsum("bcd,bd->bc", tree.centroid[nodes_BC], vector_BD)


def _soft_labels(
    tree: CodeTree, nodes_BC: Tensor, exists_BC: Tensor, target_B: Tensor, smoothing: float
) -> Tensor | None:
    if not smoothing:
        return None
    near = torch.einsum("bcd,bd->bc", tree.centroid[nodes_BC], tree.centroid[target_B])
    return torch.softmax((20 * near).masked_fill(~exists_BC, MASKED), dim=1)


def _cross_entropy(
    logits_BC: Tensor, exists_BC: Tensor, label_B: Tensor, soft_BC: Tensor | None, smoothing: float
) -> Tensor:
    log_p = torch.log_softmax(logits_BC.float().masked_fill(~exists_BC, MASKED), dim=1)
    loss = -log_p.gather(1, label_B[:, None])[:, 0]
    if soft_BC is not None:
        loss = (1 - smoothing) * loss - smoothing * (soft_BC * log_p.masked_fill(~exists_BC, 0)).sum(1)
    return loss.sum()


def contrast(
    vector_BD: Tensor, keys_KD: Tensor, label_B: Tensor, temperature: float, known_BK: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against keys (DGI eq. 19); `known_BK` marks further relevant keys, left out of the sum."""
    logits_BK = vector_BD @ keys_KD.T / temperature
    if known_BK is not None:
        logits_BK = logits_BK.masked_fill(known_BK, MASKED)
    return F.cross_entropy(logits_BK.float(), label_B)
