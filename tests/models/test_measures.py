"""Measures against the definitions written out in plain Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.measures import MEASURES, measure

DOCUMENTS = [f"d{i}" for i in range(30)]


def plain(run: dict[str, list[str]], qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """The textbook definitions; a query without results counts as zero, one without relevant documents not at all."""
    totals = dict.fromkeys(MEASURES, 0.0)
    judged = [query for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())]
    for query in judged:
        gains = [max(qrels[query].get(document, 0), 0) for document in run.get(query, [])]
        relevant = sum(grade > 0 for grade in qrels[query].values())
        for k in (1, 10, 100):
            totals[f"R@{k}"] += sum(gain > 0 for gain in gains[:k]) / relevant
        first = next((rank for rank, gain in enumerate(gains[:10], start=1) if gain > 0), None)
        totals["MRR@10"] += 1 / first if first else 0.0
        ideal = sorted((grade for grade in qrels[query].values() if grade > 0), reverse=True)[:10]
        dcg = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], start=1))
        totals["nDCG@10"] += dcg / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ideal, start=1))
    return {name: total / len(judged) for name, total in totals.items()}


@settings(max_examples=100)
@given(data=st.data())
def test_measures_are_those_of_the_textbook(data: st.DataObject) -> None:
    queries = [f"q{i}" for i in range(data.draw(st.integers(1, 6)))]
    graded = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1, max_size=12)
    qrels = {query: data.draw(graded) for query in queries}
    qrels["q0"]["d0"] = 1
    found = st.lists(st.sampled_from(DOCUMENTS), unique=True, max_size=30)
    run = {query: data.draw(found) for query in queries if data.draw(st.booleans())}
    measured = measure(run, qrels)
    assert measured == pytest.approx(plain(run, qrels))


def test_the_order_of_the_run_counts_not_the_ids() -> None:
    """Tools that break ties by id would put d9 before d1 or the reverse."""
    for first, second in (("d1", "d9"), ("d9", "d1")):
        assert measure({"q": [first, second]}, {"q": {first: 1}})["R@1"] == 1
        assert measure({"q": [first, second]}, {"q": {second: 1}})["MRR@10"] == 0.5


def test_nothing_to_measure_and_repeated_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no query has a relevant document"):
        measure({"q": ["d1"]}, {"q": {"d1": 0}})
    with pytest.raises(ValueError, match="query 'q' has a document twice among its 2 results"):
        measure({"q": ["d1", "d1"]}, {"q": {"d1": 1}})
