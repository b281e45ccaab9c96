"""Popularity buckets against counting by hand and by a dictionary."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.popularity import Bucket, head_mask, hits_by_popularity


def test_head_and_tail_are_counted_apart() -> None:
    frequency = np.array([9, 1, 0, 4])
    found = hits_by_popularity(frequency, np.array([0, 0, 1, 2, 2, 3]), np.array([1, 0, 1, 0, 0, 1], bool), buckets=2)
    assert found == [Bucket(4, 9, 2, 3, 2), Bucket(0, 1, 2, 3, 1)]


def test_a_tail_of_ties_stays_in_one_bucket() -> None:
    found = hits_by_popularity(np.array([5, 0, 0, 0, 0, 0]), np.array([0]), np.array([True]), buckets=3)
    assert [(b.least, b.most, b.documents) for b in found] == [(5, 5, 1), (0, 0, 5)]
    assert sum(b.documents for b in found) == 6


@settings(max_examples=60)
@given(data=st.data(), buckets=st.integers(1, 8))
def test_buckets_part_documents_and_queries_by_frequency(data: st.DataObject, buckets: int) -> None:
    """Nothing is lost, order is kept, equal frequencies stay together, and counts are those of a plain loop."""
    frequency = np.array(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=30)))
    asked = data.draw(st.lists(st.tuples(st.integers(0, len(frequency) - 1), st.booleans()), max_size=20))
    documents, hits = np.array([d for d, _ in asked], dtype=np.int64), np.array([h for _, h in asked], dtype=bool)
    found = hits_by_popularity(frequency, documents, hits, buckets)
    assert 1 <= len(found) <= buckets
    assert all(head.least > tail.most for head, tail in pairwise(found))
    for bucket in found:
        inside = [d for d, f in enumerate(frequency) if bucket.least <= f <= bucket.most]
        assert bucket.documents == len(inside)
        assert bucket.queries == sum(d in inside for d, _ in asked)
        assert bucket.hits == sum(d in inside and hit for d, hit in asked)
    assert sum(bucket.documents for bucket in found) == len(frequency)


def test_distinct_frequencies_give_equal_buckets() -> None:
    found = hits_by_popularity(np.random.default_rng(0).permutation(20), np.array([], int), np.array([], bool), 5)
    assert [bucket.documents for bucket in found] == [4] * 5


@pytest.mark.parametrize(
    ("frequency", "documents", "hits", "message"),
    [
        ([], [], [], "got 0 documents"),
        ([1], [0, 0], [True], "2 queries have documents, 1 have hits"),
        ([1, 2], [2], [True], "document positions 2 to 2 of 2 documents"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    frequency: list[int], documents: list[int], hits: list[bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hits_by_popularity(np.array(frequency, int), np.array(documents, int), np.array(hits, bool))


@given(
    frequencies=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_the_head_is_the_same_in_every_order(frequencies: list[int], share: float, seed: int) -> None:
    frequency_N = np.array(frequencies)
    order = np.random.default_rng(seed).permutation(len(frequency_N))
    head_N = head_mask(frequency_N, share)
    np.testing.assert_array_equal(head_mask(frequency_N[order], share), head_N[order])
    assert frequency_N[head_N].min() > frequency_N[~head_N].max(initial=-1)
    sizes = [int((frequency_N >= least).sum()) for least in set(frequencies)]
    assert abs(head_N.sum() - share * len(head_N)) == min(abs(size - share * len(head_N)) for size in sizes)


def test_a_head_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0\.2 of 0"):
        head_mask(np.zeros(0, int), 0.2)
