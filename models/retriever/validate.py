"""Validation while training: ranks of held-out documents by exact cosine and by the service's own walk.

Legend: Q queries, B beams, N documents, D dimensions, E token dimensions, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from numpy.typing import NDArray
from torch import Tensor

from models.retriever.network import KeyValue, Retriever
from models.retriever.stages import Pair, Work, encode_in_blocks
from service.index.manifest import Scoring
from service.search.ranking import rank
from service.search.tables import WalkTables
from service.search.walk import walk

MISSED = 1 << 30
BEAM = 10
DEPTH = 10
DECODER_SHARES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.75, 0.5, 0.3, 0.15)
COSINE_WEIGHTS: tuple[float, ...] = tuple(2.0 ** (step / 8) for step in range(9, 57))  # 2.2 to 128


class TorchStep:
    """The decoder of one batch as the walk wants it: keeps its caches and reorders them by the beams' parents."""

    def __init__(self, retriever: Retriever, states: Tensor, mask: Tensor, vector_QD: Tensor) -> None:
        if retriever.decoder is None:
            raise ValueError("this retriever has no decoder")
        self.decoder = retriever.decoder
        self.mask = mask
        shape = self.decoder.shape
        self.memories = self.decoder.memories(states)
        empty = torch.zeros(len(mask), 1, shape.heads, 0, shape.width // shape.heads, device=mask.device)
        self.past: list[KeyValue] = [(empty, empty)] * shape.layers
        self.vector = vector_QD if shape.bearing else None
        self.point = vector_QD.new_zeros(len(mask), 1, shape.embedding) if shape.bearing else None

    @torch.no_grad()
    def __call__(
        self, embeddings_QBE: NDArray[np.float32], step: int, parents_QB: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """One step; see `service.search.walk.Step`."""
        device = self.mask.device
        if parents_QB is not None:
            rows = torch.as_tensor(parents_QB, device=device)[:, :, None]
            parents = rows[..., None, None]
            self.point = None if self.point is None else self._reorder(self.point, rows)
            self.past = [(self._reorder(key, parents), self._reorder(value, parents)) for key, value in self.past]
        inputs = torch.as_tensor(embeddings_QBE, device=device)
        steps = torch.tensor([step], device=device)
        hidden, self.past, self.point = self.decoder.step(
            inputs, steps, self.mask, self.memories, self.past, self.vector, self.point
        )
        result: NDArray[np.float32] = hidden.float().cpu().numpy()
        return result

    @staticmethod
    def _reorder(cache: Tensor, parents: Tensor) -> Tensor:
        return cache.gather(1, parents.expand(-1, -1, *cache.shape[2:]))


def exact_ranks(work: Work, pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Rank of each pair's document by exact cosine over all documents."""
    scores_QN, target_Q = exact_scores(work, pairs)
    own = scores_QN.gather(1, target_Q[:, None])
    ranks: NDArray[np.int64] = ((scores_QN > own).sum(1) + 1).cpu().numpy()
    return ranks


@torch.no_grad()
def exact_scores(work: Work, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Cosines of the pairs' queries with all documents (Q, N), and the pairs' documents (Q)."""
    work.retriever.eval()
    rows = [query for query, _ in pairs]
    vectors_QD = work.cache.of(rows) if work.cache else encode_in_blocks(work, work.queries, rows)
    return vectors_QD @ work.vectors_ND.T, torch.tensor([document for _, document in pairs], device=work.device)


def likeliest_weight(work: Work, pairs: Sequence[Pair]) -> float:
    """The weight of cosine, in a softmax over all documents, under which the pairs' documents are likeliest."""
    scores_QN, target_Q = exact_scores(work, pairs)
    losses = [float(F.cross_entropy(weight * scores_QN.float(), target_Q)) for weight in COSINE_WEIGHTS]
    return COSINE_WEIGHTS[losses.index(min(losses))]


@torch.no_grad()
def embed_pairs(work: Work, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, states and mask of the pairs' queries with dropout off."""
    work.retriever.eval()
    queries = [query for query, _ in pairs]
    return work.cache.batch(queries) if work.cache else work.encode(work.queries, queries)


def walked_ranks(work: Work, pairs: Sequence[Pair], scoring: Scoring, batch: int = 64) -> NDArray[np.int64]:
    """Rank of each pair's document in the first ten of the walk at beam 10, lexicographic; MISSED without it."""
    tables, position = walk_tables(work)
    normalisation = work.objective.normalisation
    ranks = np.full(len(pairs), MISSED, np.int64)
    for start in range(0, len(pairs), batch):
        block = pairs[start : start + batch]
        vectors_QD, states, mask = embed_pairs(work, block)
        with torch.no_grad():
            step = TorchStep(work.retriever, states.float(), mask, vectors_QD)
        beams = walk(tables, scoring, normalisation, BEAM, vectors_QD.float().cpu().numpy(), step)
        ranked = rank(beams, "lexicographic", DEPTH, vectors_QD.float().cpu().numpy(), tables.vectors)
        for row, (_, document) in enumerate(block):
            (places,) = np.nonzero(ranked.position_QK[row, : ranked.size_Q[row]] == position[document])
            ranks[start + row] = places[0] + 1 if len(places) else MISSED
    return ranks


def walked_scores(work: Work, pairs: Sequence[Pair], measures: Sequence[str] = ("mrr",)) -> dict[str, float]:
    """Measures of the walks that the recipe trains, by name: `generative_mrr`, `guided_mrr`, and so on.

    Empty without pairs, or while codes move and there is no tree.
    """
    trained: dict[Scoring, float] = {"generative": work.objective.generative, "guided": work.objective.guided}
    if not pairs or work.tree is None:
        return {}
    walked = {name: walked_ranks(work, pairs, name) for name, weight in trained.items() if weight}
    return {f"{name}_{measure}": MEASURES[measure](ranks) for name, ranks in walked.items() for measure in measures}


@torch.no_grad()
def calibrate(work: Work, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Find how much the decoder shall say beside geometry, by what held-out queries gain; the factor, and its MRR.

    A decoder is surer of the queries that it was trained on than of new ones; and so is geometry where the encoder was
    tuned on them, so the factor may be above 1. Whichever is to count less is turned down: turned up, the other would
    be surer of every step than it was trained to be.
    """
    beside, weight = work.retriever.log_beside, work.retriever.log_weight
    trained, gains = (beside.clone(), weight.clone()), {}

    def turn(share: float) -> None:
        beside.copy_(trained[0] + math.log(min(share, 1.0)))
        weight.copy_(trained[1] - math.log(max(share, 1.0)))

    for share in DECODER_SHARES:
        turn(share)
        gains[share] = mean_reciprocal_rank(walked_ranks(work, pairs, "guided"))
    best = max(gains, key=lambda share: (gains[share], -abs(math.log(share))))  # of equals what is nearest to training
    turn(best)
    return best, gains[best]


def walk_tables(work: Work) -> tuple[WalkTables, NDArray[np.int64]]:
    """The tables of the training corpus, and each document's position in the trie's order."""
    if work.tree is None:
        raise ValueError("the walk needs the code tree")
    retriever = work.retriever
    trie, order = work.tree.trie, work.tree.order
    vectors = np.ascontiguousarray(work.vectors_ND.cpu().numpy()[order])
    level = retriever.level_of_token
    scales = (retriever.log_alone, retriever.log_beside)
    token_scale, guided_scale = (log.detach().exp()[level].cpu().numpy() for log in scales)
    tokens = torch.cat([retriever.unit_tokens(), retriever.start[None]]).detach().cpu().numpy()
    offsets = (0, *np.cumsum(retriever.level_sizes).tolist())
    weight = float(retriever.log_weight.detach().exp())
    tables = WalkTables(trie, vectors, work.tree.regions, offsets, tokens, token_scale, guided_scale, weight)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    return tables, position


def mean_reciprocal_rank(ranks: NDArray[np.int64], depth: int = DEPTH) -> float:
    """MRR@depth."""
    return float(np.where(ranks <= depth, 1 / ranks, 0.0).mean())


def recall(ranks: NDArray[np.int64], depth: int = DEPTH) -> float:
    """R@depth of queries with one relevant document each."""
    return float((ranks <= depth).mean())


MEASURES = {"mrr": mean_reciprocal_rank, "recall": recall}
