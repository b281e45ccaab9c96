"""How much words shall count beside the cosine in the mode `hybrid`: what held-out queries gain by it.

Shapes: Q queries, N documents, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.retriever.validate import mean_reciprocal_rank
from service.index.postings import build_postings
from service.model.tokens import WordTokenizer
from service.ops.progress import progress_bar
from service.search.lexical import LexicalSearch

WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)


def choose_lexical_weight(
    tokenizer: WordTokenizer,
    documents: Sequence[str],
    queries: Sequence[str],
    wanted_Q: Sequence[int],
    vectors_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
) -> tuple[float, float, float]:
    """Find the weight of words under which held-out queries find their documents first.

    Exact search by cosine + weight · share of words, over the words that the service indexes and looks for.

    Args:
        tokenizer: of the model.
        documents: what of each document is indexed, `service.index.postings.words_of`.
        queries: texts of held-out queries, without prefix and history.
        wanted_Q: the document that each asks for.
        vectors_QD: unit vectors of the queries.
        vectors_ND: unit vectors of the documents.

    Returns:
        The weight, the smallest of equals (0 where words help none); its MRR@10, and the MRR@10 without words.
    """
    postings = build_postings([tokenizer.tokens(documents)], tokenizer.vocabulary)
    search = LexicalSearch(postings, len(documents), tokenizer)
    tokens_Q, everything_N = search.tokens(queries), np.arange(len(documents))
    ranks = np.empty((len(WEIGHTS), len(queries)), np.int64)
    with progress_bar("weight of words", len(queries)) as advance:
        for row, wanted in enumerate(wanted_Q):
            cosine_N, share_N = vectors_ND @ vectors_QD[row], search.shares(tokens_Q[row], everything_N)
            for place, weight in enumerate(WEIGHTS):
                score_N = cosine_N + weight * share_N
                ranks[place, row] = 1 + int((score_N > score_N[wanted]).sum())
            advance(1)
    gains = [mean_reciprocal_rank(ranks_Q) for ranks_Q in ranks]
    best = max(range(len(gains)), key=lambda place: (gains[place], -place))
    return WEIGHTS[best], gains[best], gains[0]
