"""Baselines against brute force, and against the figures published with the data sets."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.baselines import BM25, best, dense_search
from models.data import load_dataset
from models.measures import measure

TEXTS = ["red apples grow", "green pears", "an apple and an apple pie", "ships sail at night", ""]


def test_bm25_scores_are_those_of_the_formula() -> None:
    """Lucene's variant: idf = ln(1 + (N − n + .5)/(n + .5)), tf / (tf + k1 (1 − b + b length/mean))."""
    words = [["red", "appl", "grow"], ["green", "pear"], ["appl", "appl", "pie"], ["ship", "sail", "night"], []]
    mean = sum(len(document) for document in words) / len(words)
    found = BM25(TEXTS).search(["the apples of pie"], 5)
    expected = {}
    for position, document in enumerate(words):
        score = 0.0
        for term in ("appl", "pie"):
            holders = sum(term in other for other in words)
            tf = Counter(document)[term]
            norm = 1.2 * (1 - 0.75 + 0.75 * len(document) / mean)
            score += math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5)) * tf / (tf + norm)
        if score:
            expected[position] = score
    kept = found.positions[0] >= 0
    assert dict(zip(found.positions[0][kept].tolist(), found.scores[0][kept], strict=True)) == pytest.approx(expected)
    assert found.positions[0][0] == 2


def test_a_query_without_known_words_finds_nothing() -> None:
    found = BM25(TEXTS).search(["zebra", "the"], 3)
    assert (found.positions == -1).all()


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_best_breaks_ties_by_position(seed: int, k: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, size=(3, 9)).astype(np.float32)
    found = best(scores, k)
    for row in range(3):
        expected = sorted(range(9), key=lambda i: (-scores[row, i], i))[:k]
        assert found.positions[row].tolist() == expected
        assert found.scores[row].tolist() == [scores[row, i] for i in expected]


def test_dense_search_is_brute_force_over_all_batches() -> None:
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(300, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float16)
    found = dense_search(queries, documents, 7)
    expected = np.argsort(-(queries @ documents.astype(np.float32).T), axis=1)[:, :7]
    np.testing.assert_array_equal(found.positions, expected)
    with pytest.raises(ValueError, match="queries have 8 dimensions, documents 5"):
        dense_search(queries, documents[:, :5], 7)


@pytest.mark.data
@pytest.mark.parametrize("name", ["squad-dev", "cosqa"])
def test_bm25_reproduces_the_published_figures(datasets: Path, name: str) -> None:
    data = load_dataset(datasets / name, ["test"])
    published = json.loads((datasets / name / "baseline_test.json").read_text())["bm25"]
    queries = data.judged("test")
    bm25 = BM25([f"{document.title} {document.text}" for document in data.documents])
    found = bm25.search([data.queries[query] for query in queries], 100)
    run = {
        query: [data.documents[position].id for position in row if position >= 0]
        for query, row in zip(queries, found.positions, strict=True)
    }
    measured = measure(run, data.qrels["test"])
    assert measured == pytest.approx({name: published[name] for name in measured}, abs=2.1e-3)  # ties fall elsewhere
