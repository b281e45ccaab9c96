"""Batches depend on seed and step only, and say truly what belongs to what."""

from __future__ import annotations

import numpy as np
import pytest

from models.qama import batches
from models.qama.batches import BatchSource, TrainVectors, nearest_documents, unit_vectors
from models.qama.recipe import BatchTable

TABLE = BatchTable(documents=24, groups=4, queries=16, neighbours=10, real_share=0.5, mixup=0.4)


def rows_of(found, table):
    """Row of `table` that each vector is a copy of."""
    matches = np.isclose(found[:, None], table[None], atol=1e-7).all(axis=2)
    assert (matches.sum(axis=1) >= 1).all()
    return matches.argmax(axis=1)


def test_a_batch_is_a_function_of_seed_and_step(vectors):
    a, b = (BatchSource(vectors, TABLE, seed=3) for _ in range(2))
    b.batch(0)  # what was drawn before changes nothing
    np.testing.assert_array_equal(a.batch(7).queries_QD, b.batch(7).queries_QD)
    assert not np.array_equal(a.batch(7).queries_QD, a.batch(8).queries_QD)


def test_train_queries_come_with_the_document_that_was_judged_relevant(vectors):
    batch = BatchSource(vectors, TABLE, seed=0).batch(1)
    pairs = {tuple(pair) for pair in vectors.pairs.tolist()}
    queries = rows_of(batch.queries_QD[:8], vectors.queries)
    documents = rows_of(batch.documents_ND[batch.positives_Q[:8]], vectors.documents)
    assert set(zip(queries.tolist(), documents.tolist(), strict=True)) <= pairs


def test_no_document_stands_twice_in_a_batch(vectors):
    batch = BatchSource(vectors, TABLE, seed=0).batch(2)
    assert len(np.unique(rows_of(batch.documents_ND, vectors.documents))) == len(batch.documents_ND)


def test_mixed_queries_are_unit_and_nearest_to_the_document_they_belong_to(vectors):
    source = BatchSource(TrainVectors(vectors.documents), TABLE, seed=0)
    batch = source.batch(0)
    np.testing.assert_allclose(np.linalg.norm(batch.queries_QD, axis=1), 1, atol=1e-5)
    own = np.einsum("qd,qd->q", batch.queries_QD, batch.documents_ND[batch.positives_Q])
    assert (own > 0.7).all()  # at most 0.4 of another document was mixed in


def test_neighbourhoods_hold_nearer_documents_than_random_batches(vectors):
    def mean_cosine(groups):
        table = TABLE.model_copy(update={"groups": groups})
        source = BatchSource(TrainVectors(vectors.documents), table, seed=0)
        documents = [source.batch(step).documents_ND for step in range(20)]
        return np.mean([(d @ d.T).mean() for d in documents])

    assert mean_cosine(2) > mean_cosine(0) + 0.05


def test_neighbours_are_those_of_a_full_sort(vectors):
    found = nearest_documents(vectors.queries, vectors.documents, 7)
    order = np.argsort(-(vectors.queries @ vectors.documents.T), axis=1)[:, :7]
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(order, axis=1))


@pytest.mark.parametrize("scores", [1 << 24, 360, 1])  # all anchors at once, three, one
def test_neighbourhoods_are_those_of_a_table_of_every_anchors_neighbours(scores, vectors, monkeypatch):
    """The plain definition: rank all documents for every document and train query, then draw."""
    anchors = np.concatenate([vectors.documents, vectors.queries])
    table = np.argpartition(-(anchors @ vectors.documents.T), TABLE.neighbours - 1, axis=1)[:, : TABLE.neighbours]
    monkeypatch.setattr(batches, "SCORES", scores)
    source = BatchSource(vectors, TABLE, seed=3)
    for step in range(20):
        rng, same = np.random.default_rng(step), np.random.default_rng(step)
        drawn = rng.integers(0, 120, TABLE.groups)
        drawn[:2] = 120 + np.array([step, step + 1])
        picks = rng.random((TABLE.groups, TABLE.neighbours)).argsort(axis=1)[:, : TABLE.documents // TABLE.groups]
        expected = np.take_along_axis(table[drawn], picks, axis=1)
        np.testing.assert_array_equal(source._groups(same, vectors.queries[step : step + 8]), expected)


def test_neighbours_are_looked_for_only_where_a_batch_needs_them(vectors, monkeypatch):
    asked: list[int] = []
    real = batches.nearest_documents
    monkeypatch.setattr(batches, "nearest_documents", lambda *given: (asked.append(len(given[0])), real(*given))[1])
    source = BatchSource(vectors, TABLE, seed=0)
    assert asked == []
    source.batch(5)
    assert asked == [TABLE.groups]


def test_half_of_the_groups_are_neighbourhoods_of_the_batchs_train_queries(vectors):
    table = TABLE.model_copy(update={"neighbours": 6})  # a group is 24 / 4 documents: the whole neighbourhood
    source = BatchSource(vectors, table, seed=0)
    for step in range(5):
        batch = source.batch(step)
        nearest = np.argsort(-(batch.queries_QD[:2] @ vectors.documents.T), axis=1)[:, :6]
        assert set(nearest.ravel().tolist()) <= set(rows_of(batch.documents_ND, vectors.documents).tolist())


def test_other_relevant_documents_of_a_train_query_are_marked(vectors):
    near = np.argsort(-(vectors.queries @ vectors.documents.T), axis=1)[:, :4]  # each query: its four nearest
    pairs = np.stack([np.repeat(np.arange(40), 4), near.ravel()], axis=1)
    batch = BatchSource(TrainVectors(vectors.documents, vectors.queries, pairs), TABLE, seed=0).batch(3)
    queries, documents = rows_of(batch.queries_QD[:8], vectors.queries), rows_of(batch.documents_ND, vectors.documents)
    known = {tuple(pair) for pair in pairs.tolist()}
    for i, query in enumerate(queries.tolist()):
        for n, document in enumerate(documents.tolist()):
            other = (query, document) in known and n != batch.positives_Q[i]
            assert batch.others_QN[i, n] == other
    assert batch.others_QN[:8].sum() > 8
    assert not batch.others_QN[8:].any()  # of mixed queries nothing else is known


def test_without_pairs_no_document_is_marked(vectors):
    batch = BatchSource(TrainVectors(vectors.documents), TABLE, seed=0).batch(0)
    assert batch.others_QN.shape == (16, len(batch.documents_ND))
    assert not batch.others_QN.any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((3, 4), int), r"got \(3, 4\) int64"),
        (np.ones(4, np.float32), r"got \(4,\)"),
        (np.array([[1.0, 0], [0, 0]]), "1 of 2 vectors are zero, NaN or infinite, the first is row 1"),
        (np.array([[np.nan, 0]]), "first is row 0"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused_with_numbers(bad, message):
    with pytest.raises(ValueError, match=message):
        unit_vectors(bad)


def test_pairs_outside_the_vectors_are_refused(vectors):
    with pytest.raises(ValueError, match="outside 40 queries and 120 documents"):
        TrainVectors(vectors.documents, vectors.queries, np.array([[40, 0]]))
    with pytest.raises(ValueError, match="documents must be unit vectors"):
        TrainVectors(2 * vectors.documents)
