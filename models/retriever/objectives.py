"""Training objectives over a code tree: constrained, guided and plain next-token losses, and InfoNCE.

Legend: B pairs of a batch, L levels, N documents, T tokens, C children of a node (padded), K keys, D vector dimensions.

cSFT is HHQ eq. 8-10. Guided cSFT adds the geometry of the tree to the same masked softmax: the logit of child k is
scale_l · cos(hidden, e_k) + weight · reach of child k (`service.index.regions`), with gradients into the encoder
through both terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from models.retriever.network import Retriever
from models.retriever.tree import NO_CHILD, CodeTree, Nearness, children, reaches, shares

MASKED = -1e9


@dataclass(frozen=True)
class Scales:
    """Learnt scalars: `alone` (T) for generative scoring, `beside` (T) and one `weight` for guided scoring."""

    alone: Tensor
    beside: Tensor
    weight: Tensor

    @classmethod
    def of(cls, retriever: Retriever) -> Scales:
        """Spread the scales of the levels over their tokens."""
        level = retriever.level_of_token
        return cls(retriever.log_alone.exp()[level], retriever.log_beside.exp()[level], retriever.log_weight.exp())


def masked_loss(
    tree: CodeTree,
    level: int,
    documents_B: Tensor,
    cosine_BT: Tensor,
    near: Nearness,
    scales: Scales,
    distillation: float,
) -> Tensor:
    """Cross-entropy of one level under cSFT, summed over the B pairs (HHQ eq. 10).

    `cosine_BT` are cosines of the hidden state with every token. Nodes with one child, and documents whose SID has
    ended, cost nothing. `distillation` is the share of the target that the dense retriever gives: the chances of the
    documents under each child by exact cosine.
    """
    alive, nodes_BC, exists_BC, label = _choices(tree, level, documents_B)
    if not len(label):
        return cosine_BT.sum() * 0
    tokens_BC = tree.token[nodes_BC]
    logits_BC = scales.alone[tokens_BC] * cosine_BT[alive].gather(1, tokens_BC)
    log_p = torch.log_softmax(logits_BC.float().masked_fill(~exists_BC, MASKED), dim=1)
    loss_B = -log_p.gather(1, label[:, None])[:, 0]
    if distillation:
        soft_BC = shares(tree, nodes_BC, exists_BC, near.of(alive))
        loss_B = (1 - distillation) * loss_B - distillation * (soft_BC * log_p.masked_fill(~exists_BC, 0)).sum(1)
    return loss_B.sum()


def guided_loss(
    tree: CodeTree, level: int, documents_B: Tensor, cosine_BT: Tensor, near: Nearness, scales: Scales
) -> Tensor:
    """Cross-entropy of one level under guided cSFT, summed over the B pairs; labels only: geometry is in the logits."""
    alive, nodes_BC, exists_BC, label = _choices(tree, level, documents_B)
    if not len(label):
        return cosine_BT.sum() * 0
    tokens_BC = tree.token[nodes_BC]
    cosine_BC = cosine_BT[alive].gather(1, tokens_BC)
    logits_BC = scales.beside[tokens_BC] * cosine_BC + scales.weight * reaches(tree, nodes_BC, near.of(alive))
    return F.cross_entropy(logits_BC.float().masked_fill(~exists_BC, MASKED), label, reduction="sum")


def unmasked_loss(
    tree: CodeTree,
    level: int,
    documents_B: Tensor,
    cosine_BT: Tensor,
    near: Nearness,
    scales: Scales,
    distillation: float,
    predecessor: bool,
) -> Tensor:
    """Cross-entropy of one level, summed over pairs, without the full-prefix trie.

    `predecessor`: only tokens that follow the previous token anywhere in the corpus (HHQ eq. 8 to the letter).
    Otherwise plain next-token training over the vocabulary of the levels that stand at this depth. What the dense
    retriever gives of the target is the same as in `masked_loss`: the children of the prefix have a share of it, all
    other tokens none.
    """
    if level >= len(tree.spans):
        return cosine_BT.new_zeros(())
    sids_B = tree.sids[documents_B]
    target = sids_B[:, level]
    if predecessor:
        before = sids_B[:, level - 1] if level else torch.full_like(target, len(tree.follow) - 1)
        allowed_BT = tree.follow[before.clamp_min(0)]
    else:
        (lo, hi), token_T = tree.spans[level], torch.arange(cosine_BT.shape[1], device=cosine_BT.device)
        allowed_BT = ((lo <= token_T) & (token_T < hi))[None]
    log_p = torch.log_softmax((scales.alone * cosine_BT).float().masked_fill(~allowed_BT, MASKED), dim=1)
    loss_B = -log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    alive, nodes_BC, exists_BC, label = _choices(tree, level, documents_B)
    if distillation and len(label):
        soft_BC = shares(tree, nodes_BC, exists_BC, near.of(alive))
        taught = -(soft_BC * log_p[alive].gather(1, tree.token[nodes_BC])).sum(1)
        loss_B = loss_B.masked_scatter(alive, (1 - distillation) * loss_B[alive] + distillation * taught)
    return loss_B[target >= 0].sum()


def _choices(tree: CodeTree, level: int, documents_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where there is something to choose: rows (B), then of these the children, which exist, and the label's place."""
    parent, target = tree.path[documents_B, level], tree.path[documents_B, level + 1]
    nodes_BC, exists_BC = children(tree, parent.clamp_min(0))
    alive = (target != NO_CHILD) & (exists_BC.sum(1) > 1)
    nodes_BC = nodes_BC[alive]
    return alive, nodes_BC, exists_BC[alive], target[alive] - nodes_BC[:, 0]


def contrast(
    vector_BD: Tensor, keys_KD: Tensor, label_B: Tensor, temperature: float, known_BK: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against keys (DGI eq. 19); `known_BK` marks further relevant keys, left out of the sum."""
    logits_BK = vector_BD @ keys_KD.T / temperature
    if known_BK is not None:
        logits_BK = logits_BK.masked_fill(known_BK, MASKED)
    return F.cross_entropy(logits_BK.float(), label_B)
