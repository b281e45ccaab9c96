"""Deep measures against their definitions written out, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.measures import measure
from models.measures_deep import head_documents, measure_deep, scaled_depths, split_qrels

DOCUMENTS = [f"d{i}" for i in range(30)]
RUNS = st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from(DOCUMENTS), unique=True))
QRELS = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 2), min_size=1), min_size=1
)


@settings(max_examples=60)
@given(run=RUNS, qrels=QRELS)
def test_recall_and_items_per_query_are_those_of_the_definitions(
    run: dict[str, list[str]], qrels: dict[str, dict[str, int]]
) -> None:
    judged = [query for query in qrels if any(grade > 0 for grade in qrels[query].values())]
    if not judged:
        with pytest.raises(ValueError, match="0 queries have a relevant document"):
            measure_deep(run, qrels, (1, 10))
        return
    found = measure_deep(run, qrels, (1, 10, 25))
    for depth in (1, 10, 25):
        total = 0.0
        for query in judged:
            relevant = [document for document, grade in qrels[query].items() if grade > 0]
            total += sum(document in run.get(query, [])[:depth] for document in relevant) / len(relevant)
        assert found.recall[depth] == pytest.approx(total / len(judged))
    assert found.retrieved == pytest.approx(sum(len(run.get(query, [])) for query in judged) / len(judged))
    assert found.queries == len(judged)
    assert found.recall[10] == pytest.approx(measure(run, qrels)["R@10"])  # another implementation


@pytest.mark.parametrize(
    ("documents", "depths"),
    [(5_000_000, (250, 500, 1000)), (10_000, (250, 500, 1000)), (8_000, (200, 400, 800)), (40, (1, 2, 4))],
)
def test_depths_keep_their_proportion_and_are_at_most_a_tenth_and_an_answer(
    documents: int, depths: tuple[int, ...]
) -> None:
    assert scaled_depths(documents) == depths


def test_a_corpus_too_small_for_depths_is_refused() -> None:
    with pytest.raises(ValueError, match="39 documents are too few"):
        scaled_depths(39)


def test_head_and_tail_share_out_the_judgements() -> None:
    head = head_documents({"d3": 9, "d5": 2}, DOCUMENTS[:10], 0.3)
    assert head == {"d3", "d5"}  # all others are asked for equally often
    parts = split_qrels({"a": {"d3": 1, "d7": 1}, "b": {"d5": 2}, "c": {"d9": 1}}, head)
    assert parts == {"head": {"a": {"d3": 1}, "b": {"d5": 2}}, "tail": {"a": {"d7": 1}, "c": {"d9": 1}}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: head_documents({"x": 1, "d1": 2}, DOCUMENTS, 0.2),
            "name 1 of 2 documents .* 30 of the corpus, e.g. 'x'",
        ),
        (lambda: head_documents({}, DOCUMENTS, 1.0), "a share above 0 and below 1 of some documents, got 1.0 of 30"),
        (lambda: measure_deep({}, {"a": {"d1": 1}}, ()), r"1 queries have a relevant document, depths are \[\]"),
        (lambda: measure_deep({"a": ["d1", "d1"]}, {"a": {"d1": 1}}, (5,)), "'a' has a document twice among its 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
