"""Ranking against Python's sort over every document of every beam."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.index.regions import build_regions
from service.index.trie import build_trie
from service.search.filters import DocumentFilter
from service.search.ranking import RANKINGS, Ranking, rank
from service.search.tables import WalkTables
from service.search.walk import Beams, walk

D = 4


def make_beams(leaves: list[tuple[int, int, float]], queries: int = 1) -> Beams:
    """Return beams that are the same for every query: (lo, hi, score), best first."""
    lo, hi, score = (np.array([column] * queries) for column in zip(*leaves, strict=True))
    size = np.full(queries, len(leaves))
    nothing = np.zeros(lo.shape)
    return Beams(np.zeros_like(lo), lo, hi, score.astype(np.float64), nothing, 0.0, size, size, 1, None)


def grid_vectors(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Return vectors of small whole numbers: cosines repeat and are exact in float32."""
    return rng.integers(-1, 2, (rows, D)).astype(np.float32)


@pytest.mark.parametrize("ranking", RANKINGS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    top_k=st.integers(1, 30),
    filtered=st.booleans(),
)
def test_order_equals_a_plain_sort(ranking: Ranking, seed: int, sizes: list[int], top_k: int, filtered: bool) -> None:
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *sizes])
    documents, queries = grid_vectors(rng, int(bounds[-1])), grid_vectors(rng, 2)
    scores = np.sort(rng.integers(-3, 1, len(sizes)))[::-1]
    shuffled = rng.permutation(len(sizes))  # the best beam need not hold the first documents
    leaves = [(int(bounds[i]), int(bounds[i + 1]), float(s)) for i, s in zip(shuffled, scores, strict=True)]
    mask = rng.random(len(documents)) < 0.6
    eligible = DocumentFilter.from_mask(mask) if filtered else None
    ranked = rank(make_beams(leaves, 2), ranking, top_k, queries, documents, 0.5, eligible)
    for query in range(2):
        rows = []
        for beam, (lo, hi, score) in enumerate(leaves):
            for position in range(lo, hi):
                if mask[position] or not filtered:
                    cosine = float(documents[position] @ queries[query])
                    key = {"lexicographic": (-score, -cosine), "cosine": (-cosine,), "fused": (-score - 0.5 * cosine,)}
                    rows.append((*key[ranking], position, beam, cosine))
        expected = sorted(rows)[:top_k]
        size = int(ranked.size_Q[query])
        assert size == len(expected)
        assert ranked.position_QK[query, :size].tolist() == [row[-3] for row in expected]
        assert ranked.beam_QK[query, :size].tolist() == [row[-2] for row in expected]
        assert ranked.cosine_QK[query, :size].tolist() == [row[-1] for row in expected]
        assert ranked.score_QK[query, :size].tolist() == [-row[0] for row in expected]


@pytest.mark.parametrize("ranking", ["lexicographic", "fused"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8), top_k=st.integers(1, 20))
def test_a_document_counts_its_own_cosine_in_the_place_of_its_leafs_reach(
    ranking: Ranking, seed: int, sizes: list[int], top_k: int
) -> None:
    """Guided beams: what the decoder changed, plus 4 times the best cosine of a leaf; documents have their own."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *sizes])
    documents, query = grid_vectors(rng, int(bounds[-1])), grid_vectors(rng, 1)
    cosines = documents @ query[0]
    gains = rng.integers(-3, 4, len(sizes)).astype(np.float64)
    reach = np.maximum.reduceat(cosines, bounds[:-1]).astype(np.float64)
    order = np.argsort(-(gains + 4 * reach), kind="stable")
    beams = make_beams([(int(bounds[i]), int(bounds[i + 1]), gains[i] + 4 * reach[i]) for i in order])
    beams = replace(beams, geometry_QB=4 * reach[order][None], weight=4.0)
    ranked = rank(beams, ranking, top_k, query, documents, 0.5)
    leaf = np.repeat(np.arange(len(sizes)), sizes)
    scores = gains[leaf] + 4 * cosines + (0.5 * cosines if ranking == "fused" else 0)
    ties = -cosines if ranking == "lexicographic" else np.zeros(len(cosines))
    expected = sorted(range(len(documents)), key=lambda d: (-scores[d], ties[d], d))[:top_k]
    assert ranked.position_QK[0, : len(expected)].tolist() == expected
    assert ranked.score_QK[0, : len(expected)].tolist() == scores[expected].tolist()


def test_huge_leaf_gives_its_best_by_cosine() -> None:
    rng = np.random.default_rng(1)
    documents = rng.normal(size=(5000, D)).astype(np.float32)
    query = rng.normal(size=(1, D)).astype(np.float32)
    ranked = rank(make_beams([(0, 5000, -0.5), (0, 1, -0.7)]), "lexicographic", 7, query, documents)
    assert ranked.position_QK[0].tolist() == np.argsort(-(documents @ query[0]))[:7].tolist()


def test_lexicographic_reads_no_leaf_that_it_does_not_need() -> None:
    """A leaf behind the needed ones may hold anything: here documents that are not numbers."""
    documents = np.ones((6, D), np.float32)
    documents[3:] = np.nan
    ranked = rank(make_beams([(0, 3, -0.1), (3, 6, -0.2)]), "lexicographic", 3, documents[:1], documents)
    assert ranked.position_QK[0].tolist() == [0, 1, 2]


def test_bad_arguments_are_refused() -> None:
    beams, vectors = make_beams([(0, 1, 0.0)]), np.ones((1, D), np.float32)
    with pytest.raises(ValueError, match="choose one of lexicographic, cosine, fused"):
        rank(beams, "best", 1, vectors, vectors)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k 0"):
        rank(beams, "cosine", 0, vectors, vectors)
    with pytest.raises(ValueError, match=r"expected float32 of \(1, 4\)"):
        rank(beams, "cosine", 1, vectors[:, :2], vectors)


def test_a_filter_of_other_documents_is_refused() -> None:
    documents = grid_vectors(np.random.default_rng(0), 6)
    with pytest.raises(ValueError, match="the filter is over 5 documents, the index has 6"):
        rank(
            make_beams([(0, 6, 0.0)]),
            "cosine",
            3,
            documents[:1],
            documents,
            1.0,
            DocumentFilter.from_mask(np.ones(5, bool)),
        )


@pytest.mark.parametrize("seed", range(40))
def test_the_first_of_few_is_the_first_of_many(seed: int) -> None:
    """Documents so near each other that sums in another order change their places."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(1, 384))
    near_ND = centre + rng.normal(size=(12, 384)) * 1e-6
    near_ND = (near_ND / np.linalg.norm(near_ND, axis=1, keepdims=True)).astype(np.float32)
    query = (centre / np.linalg.norm(centre)).astype(np.float32)
    trie, _ = build_trie(np.arange(12, dtype=np.int32)[:, None])
    tables = WalkTables(trie, near_ND, build_regions(trie, near_ND), (0, 12))
    beams = walk(tables, "geometric", "constrained", 12, query, None)
    few, many = (rank(beams, "lexicographic", top_k, query, near_ND).position_QK[0] for top_k in (1, 12))
    assert few[0] == many[0]
