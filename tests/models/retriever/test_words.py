"""The weight of words beside the cosine, chosen by held-out queries."""

from __future__ import annotations

import numpy as np
import pytest

from models.retriever.batches import Texts
from models.retriever.words import WEIGHTS, choose_lexical_weight

DOCUMENTS = Texts([[1, 10, 2], [1, 11, 2], [1, 12, 2], [1, 13, 2]], 0)  # 1 and 2 stand in all, as special tokens do
PAIRS = [(0, 0), (1, 1), (2, 2), (3, 3)]


def vectors(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_where_words_say_all_they_are_turned_up() -> None:
    queries = Texts([[1, 10, 2], [1, 11, 2], [1, 12, 2], [1, 13, 2]], 0)
    weight, gained, before = choose_lexical_weight(DOCUMENTS, queries, PAIRS, vectors(0), vectors(1))
    assert weight >= 0.3
    assert gained == 1.0 > before


def test_where_words_mislead_they_are_turned_down() -> None:
    """Every query holds the word of a document that it does not ask for, and its vector is right."""
    queries = Texts([[1, 11, 2], [1, 12, 2], [1, 13, 2], [1, 10, 2]], 0)
    exact = vectors(2)
    weight, gained, before = choose_lexical_weight(DOCUMENTS, queries, PAIRS, exact, exact)
    assert weight == WEIGHTS[0]
    assert gained == before == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_gain_is_that_of_the_weight(seed: int) -> None:
    """By hand: ranks under cosine + weight · share, where one word of two matches one document."""
    queries = Texts([[1, 10, 2], [1, 99, 2], [1, 13, 2], [1, 10, 2]], 0)
    vectors_QD, vectors_ND = vectors(seed), vectors(seed + 10)
    weight, gained, before = choose_lexical_weight(DOCUMENTS, queries, PAIRS, vectors_QD, vectors_ND)

    def mrr(weight: float) -> float:
        total = 0.0
        for row, (query, wanted) in enumerate(PAIRS):
            hits = np.array([len({*queries.ids[query][1:-1]} & {*ids}) for ids in DOCUMENTS.ids])
            common, rare = np.log1p(0.5 / 4.5), np.log1p(3.5 / 1.5)  # idf in all four documents, in one
            known = queries.ids[query][1] != 99
            share = (2 * common + hits * rare) / (2 * common + known * rare) / 2.2  # each once: tf (k1 + 1) / (tf + k1)
            scores = vectors_ND @ vectors_QD[row] + weight * share
            total += 1 / (1 + (scores > scores[wanted]).sum())
        return total / len(PAIRS)

    assert gained == pytest.approx(max(mrr(weight) for weight in WEIGHTS)) == pytest.approx(mrr(weight))
    assert before == pytest.approx(mrr(0.0))
