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


def step_losses(
    tree: CodeTree,
    level: int,
    documents_B: Tensor,
    cosine_BT: Tensor,
    near: Nearness,
    scales: Scales,
    distillation: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one level under cSFT: (generative, guided), each summed over the B pairs (HHQ eq. 10).

    `cosine_BT` are cosines of the hidden state with every token. Nodes with one child, and documents whose SID has
    ended, cost nothing. `distillation` is the share of the generative target that the dense retriever gives: the
    chances of the documents under each child by exact cosine. The guided loss has geometry in its logits already.
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
    reach_BC = reaches(tree, nodes_BC, near.of(alive))
    label = target - nodes_BC[:, 0]
    alone = scales.alone[tokens_BC] * cosine_BC
    guided = scales.beside[tokens_BC] * cosine_BC + scales.weight * reach_BC
    soft_BC = shares(tree, nodes_BC, exists_BC, near.of(alive)) if distillation else None
    return _cross_entropy(alone, exists_BC, label, soft_BC, distillation), _cross_entropy(guided, exists_BC, label)


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


def _cross_entropy(
    logits_BC: Tensor,
    exists_BC: Tensor,
    label_B: Tensor,
    soft_BC: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    log_p = torch.log_softmax(logits_BC.float().masked_fill(~exists_BC, MASKED), dim=1)
    loss = -log_p.gather(1, label_B[:, None])[:, 0]
    if soft_BC is not None:
        loss = (1 - share) * loss - share * (soft_BC * log_p.masked_fill(~exists_BC, 0)).sum(1)
    return loss.sum()


def contrast(
    vector_BD: Tensor, keys_KD: Tensor, label_B: Tensor, temperature: float, known_BK: Tensor | None = None
) -> Tensor:
    """InfoNCE of queries against keys (DGI eq. 19); `known_BK` marks further relevant keys, left out of the sum."""
    logits_BK = vector_BD @ keys_KD.T / temperature
    if known_BK is not None:
        logits_BK = logits_BK.masked_fill(known_BK, MASKED)
    return F.cross_entropy(logits_BK.float(), label_B)
