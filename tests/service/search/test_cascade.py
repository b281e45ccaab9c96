"""The prefix cascade against a plain restatement: shortlist by prefix distance, then sort by the whole distance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from service.model.layout import CodeError
from service.search.cascade import cascade_topk, measure_cascade_recall
from service.search.hamming import HammingIndex, KernelName, hamming_topk

Words = npt.NDArray[np.uint64]


def distances(codes_NW: Words, query_W: Words) -> npt.NDArray[np.int64]:
    differing = np.ascontiguousarray(codes_NW ^ query_W).view(np.uint8)
    counts: npt.NDArray[np.int64] = np.unpackbits(differing, axis=1).sum(axis=1, dtype=np.int64)
    return counts


@pytest.mark.parametrize("kernel", ["numba", "numpy"])
@pytest.mark.parametrize("words", [1, 2, 4])
def test_the_cascade_sorts_the_prefix_shortlist_by_whole_distance(kernel: KernelName, words: int) -> None:
    rng = np.random.default_rng(words)
    codes = rng.integers(0, 2**64, (2_000, 5), dtype=np.uint64)
    queries = rng.integers(0, 2**64, (37, 5), dtype=np.uint64)
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        found = cascade_topk(index, queries, 8, words, 0.01)
    for row, query in enumerate(queries):
        shortlist = np.argsort(distances(codes[:, :words], query[:words]), kind="stable")[:20]
        whole = distances(codes[shortlist], query)
        best = np.lexsort((shortlist, whole))[:8]
        np.testing.assert_array_equal(found.positions_QK[row], shortlist[best])
        np.testing.assert_array_equal(found.distances_QK[row], whole[best])


def test_the_whole_corpus_as_shortlist_is_the_exact_search_under_a_filter() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 4, (130, 3), dtype=np.uint64)
    eligible = np.array([0b1011, 0, 0b10], np.uint64)
    with HammingIndex.from_codes(codes) as index:
        exact = hamming_topk(index, codes[:4], 6, eligible=eligible)
        found = cascade_topk(index, codes[:4], 6, 1, 1.0, eligible)
    np.testing.assert_array_equal(found.positions_QK, exact.positions_QK)
    np.testing.assert_array_equal(found.distances_QK, exact.distances_QK)
    assert (found.positions_QK[:, 4:] == -1).all()


def test_recall_is_one_where_the_prefix_decides_and_low_where_it_is_noise() -> None:
    rng = np.random.default_rng(4)
    telling = rng.integers(0, 2**64, (4_000, 3), dtype=np.uint64)
    telling[:, 1:] = 0
    noise = telling[:, ::-1].copy()  # the first words are equal everywhere, the last decides
    with HammingIndex.from_codes(telling) as index:
        assert measure_cascade_recall(index, telling[:20], 5, 1, 0.01) == 1.0
    with HammingIndex.from_codes(noise) as index:
        assert measure_cascade_recall(index, noise[-20:], 5, 1, 0.01) < 0.2


def test_stages_that_make_no_sense_are_refused() -> None:
    index = HammingIndex.from_codes(np.zeros((50, 3), np.uint64))
    queries = np.zeros((1, 3), np.uint64)
    with pytest.raises(CodeError, match="1 to 2 of 3 words"):
        cascade_topk(index, queries, 5, 3, 0.1)
    with pytest.raises(CodeError, match="share"):
        cascade_topk(index, queries, 5, 1, 0.0)
    with pytest.raises(CodeError, match="nothing to measure"):
        measure_cascade_recall(index, queries[:0], 5, 1, 0.1)
    assert cascade_topk(index, queries[:0], 5, 1, 0.1).positions_QK.shape == (0, 5)
