"""Regions against statistics restated with numpy, and their reach against the best document."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.index import regions as module
from service.index.regions import HANDFUL, MOST_AXES, OPTIMISM, build_regions, measure_region
from service.index.trie import build_trie, node_ends


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def reach(query: NDArray[Any], rows: NDArray[Any], rest: float) -> float:
    """Return a region's reach, as its module defines it."""
    return float(query @ rows[0] + np.sqrt(rest + ((rows[1:] @ query) ** 2).sum()))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), documents=st.integers(1, 80), codes=st.integers(1, 4), levels=st.integers(1, 3))
def test_regions_hold_mean_and_variance_of_inner_nodes_with_more_than_a_handful(
    seed: int, documents: int, codes: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    table = (rng.integers(0, codes, (documents, levels)) + np.arange(levels) * codes).astype(np.int32)
    trie, _ = build_trie(table)
    vectors = unit(rng.normal(size=(documents, 9)))
    regions = build_regions(trie, vectors)
    ends = node_ends(trie)
    owners: dict[tuple[int, int], int] = {}
    for node in range(trie.nodes):
        lo, hi = int(trie.lo_M[node]), int(ends[node])
        region = int(regions.region_M[node])
        if hi - lo <= HANDFUL or trie.child_M[node] == trie.child_M[node + 1]:
            assert region == -1
            continue
        assert owners.setdefault((lo, hi), region) == region, "nodes with one range share a region"
        rows = regions.rows_RD[regions.start_C[region] : regions.start_C[region + 1]]
        inside = vectors[lo:hi].astype(np.float64)
        assert len(rows) == 1 + min(9, MOST_AXES, (hi - lo) // HANDFUL)
        np.testing.assert_allclose(rows[0], inside.mean(axis=0), atol=1e-6)
        variances = np.linalg.svd(inside - inside.mean(axis=0), compute_uv=False) ** 2 / len(inside)
        factor = OPTIMISM**2 * 2 * np.log(len(inside))
        axes = len(rows) - 1
        np.testing.assert_allclose((rows[1:] ** 2).sum(1), factor * variances[:axes], atol=1e-5)
        rest = factor * variances[axes:].sum() / max(9 - axes, 1)
        assert regions.rest_C[region] == pytest.approx(rest, abs=1e-5)
    assert sorted(set(owners.values())) == list(range(regions.count))


@pytest.mark.parametrize("documents", [20, 700])
def test_with_all_axes_the_reach_is_mean_plus_scaled_deviation(documents: int) -> None:
    """Both ways to the axes (fewer documents than dimensions, and more) give the query's own standard deviation."""
    rng = np.random.default_rng(3)
    vectors = unit(rng.normal(size=(documents, 32)) * np.linspace(0.1, 2, 32) + 1)
    query = unit(rng.normal(size=(1, 32)))[0].astype(np.float64)
    rows, rest = measure_region(vectors, min(documents, 32))
    cosines = vectors.astype(np.float64) @ query
    expected = cosines.mean() + OPTIMISM * np.sqrt(2 * np.log(documents)) * cosines.std()
    assert reach(query, rows, rest) == pytest.approx(expected, abs=1e-6)


def test_the_reach_comes_nearer_to_the_best_document_than_the_centre_does() -> None:
    rng = np.random.default_rng(4)
    centres = unit(rng.normal(size=(40, 48)))
    far = near = 0.0
    for centre in centres:
        vectors = unit(centre + 0.12 * rng.normal(size=(60, 48)) * np.linspace(0.2, 2, 48))
        rows, rest = measure_region(vectors, 7)
        query = unit(rng.normal(size=(1, 48)) + 3 * vectors[:1])[0].astype(np.float64)
        best = float((vectors @ query).max())
        far += abs(best - float(query @ rows[0]))
        near += abs(best - reach(query, rows, rest))
    assert near < far / 2


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(5).normal(size=(100, 8)))
    whole, rest = measure_region(vectors, 4)
    monkeypatch.setattr(module, "WINDOW", 7)
    parts, other = measure_region(vectors, 4)
    np.testing.assert_allclose(np.abs(parts), np.abs(whole), atol=1e-12)
    assert rest == pytest.approx(other)


def test_vectors_that_cancel_out_have_a_zero_centre() -> None:
    trie, _ = build_trie(np.array([[0]] * 5 + [[1]] * 5, np.int32))
    regions = build_regions(trie, np.array([[1, 0], [-1, 0]] * 5, np.float32))
    assert regions.region_M.tolist() == [0, -1, -1]
    assert regions.rows_RD[0].tolist() == [0, 0]
    assert np.isfinite(regions.rows_RD).all()


def test_equal_vectors_reach_no_further_than_themselves() -> None:
    trie, _ = build_trie(np.array([[0]] * 6 + [[1]] * 6, np.int32))
    regions = build_regions(trie, np.tile(np.array([[0.6, 0.8]], np.float32), (12, 1)))
    assert regions.rest_C.tolist() == pytest.approx([0], abs=1e-9)
    np.testing.assert_allclose(regions.rows_RD[1:], 0, atol=1e-6)


def test_progress_is_told_in_documents() -> None:
    told: list[int] = []
    trie, _ = build_trie(np.array([[0]] * 6 + [[1]] * 6, np.int32))
    build_regions(trie, unit(np.random.default_rng(0).normal(size=(12, 3))), told.append)
    assert told == [12]


def test_vectors_of_other_documents_are_refused() -> None:
    trie, _ = build_trie(np.zeros((6, 1), np.int32))
    with pytest.raises(ValueError, match="the trie has 6 documents"):
        build_regions(trie, np.zeros((5, 2), np.float32))
