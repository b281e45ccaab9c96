"""How much words shall count beside the cosine in the mode `hybrid`: what held-out queries gain by it.

Shapes: N documents, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.retriever.batches import Texts
from models.retriever.stages import Pair
from models.retriever.validate import mean_reciprocal_rank
from service.index.postings import build_postings
from service.ops.progress import progress_bar
from service.search.lexical import LexicalSearch

WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)


def choose_lexical_weight(
    documents: Texts,
    queries: Texts,
    pairs: list[Pair],
    vectors_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
) -> tuple[float, float, float]:
    """Find the weight of words under which held-out queries find their documents first.

    Exact search by cosine + weight · share of words, over tokens as the encoder reads them: a text that is cut for the
    encoder is cut here too.

    Args:
        documents: tokenized documents.
        queries: tokenized queries.
        pairs: held-out pairs of a query and its document.
        vectors_QD: unit vectors of the pairs' queries.
        vectors_ND: unit vectors of the documents.

    Returns:
        The weight, the smallest of equals; its MRR@10, and the MRR@10 without words.
    """
    vocabulary = 1 + max(token for texts in (documents, queries) for row in texts.ids for token in row)
    search, everything = (
        LexicalSearch(build_postings([documents.ids], vocabulary), len(documents)),
        np.arange(len(documents)),
    )
    tokens_Q = search.known([queries.ids[query] for query, _ in pairs])
    ranks = np.empty((1 + len(WEIGHTS), len(pairs)), np.int64)
    with progress_bar("weight of words", len(pairs)) as advance:
        for row, (_, wanted) in enumerate(pairs):
            cosine_N, share_N = vectors_ND @ vectors_QD[row], search.shares(tokens_Q[row], everything)
            for place, weight in enumerate((0.0, *WEIGHTS)):
                score_N = cosine_N + weight * share_N
                ranks[place, row] = 1 + int((score_N > score_N[wanted]).sum())
            advance(1)
    gains = [mean_reciprocal_rank(ranks_Q) for ranks_Q in ranks]
    best = max(range(1, len(gains)), key=lambda place: (gains[place], -place))
    return WEIGHTS[best - 1], gains[best], gains[0]
