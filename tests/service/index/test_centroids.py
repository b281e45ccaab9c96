"""Stored centroids against plain means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.centroids import HANDFUL, build_centroids
from service.index.trie import build_trie, node_ends


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), documents=st.integers(1, 80), codes=st.integers(1, 4), levels=st.integers(1, 3))
def test_centroids_are_unit_means_of_nodes_with_more_than_a_handful(
    seed: int, documents: int, codes: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    table = (rng.integers(0, codes, (documents, levels)) + np.arange(levels) * codes).astype(np.int32)
    trie, _ = build_trie(table)
    vectors = rng.normal(size=(documents, 9)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, rows = build_centroids(trie, vectors)
    ends = node_ends(trie)
    ranges = {}
    for node in range(trie.nodes):
        lo, hi = int(trie.lo_M[node]), int(ends[node])
        if hi - lo <= HANDFUL:
            assert rows[node] == -1
            continue
        mean = vectors[lo:hi].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(centroids[rows[node]], mean / np.linalg.norm(mean), atol=1e-6)
        assert ranges.setdefault((lo, hi), rows[node]) == rows[node], "nodes with one range share a row"
    assert sorted(set(ranges.values())) == list(range(len(centroids)))


def test_vectors_that_cancel_out_give_a_zero_centroid() -> None:
    trie, _ = build_trie(np.zeros((6, 1), np.int32))
    vectors = np.array([[1, 0], [-1, 0]] * 3, np.float32)
    centroids, rows = build_centroids(trie, vectors)
    assert rows.tolist() == [0]
    assert centroids.tolist() == [[0, 0]]


def test_vectors_of_other_documents_are_refused() -> None:
    trie, _ = build_trie(np.zeros((6, 1), np.int32))
    with pytest.raises(ValueError, match="the trie has 6 documents"):
        build_centroids(trie, np.zeros((5, 2), np.float32))
