"""The Hamming search against brute force: `unpackbits(a ^ b).sum()`, then a stable sort by distance."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features
from numba import njit

from service.model.layout import CodeError
from service.model.packing import from_blocks, to_blocks
from service.search import hamming, hamming_kernel
from service.search.hamming import HammingIndex, KernelName, Nearest, hamming_topk

Words = npt.NDArray[np.uint64]
KERNELS: list[KernelName] = ["numba", "numpy"]


def random_codes(rng: np.random.Generator, rows: int, words: int, ties: bool = False) -> Words:
    codes = rng.integers(0, 2**64, (rows, words), dtype=np.uint64)
    return codes & np.uint64(0x0000000100000001) if ties else codes


def brute_force(
    codes_NW: Words, queries_QW: Words, k: int, eligible_N: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    distances_QK = np.full((len(queries_QW), k), -1, np.int64)
    positions_QK = np.full((len(queries_QW), k), -1, np.int64)
    candidates = np.arange(len(codes_NW)) if eligible_N is None else np.flatnonzero(eligible_N)
    for q, query in enumerate(queries_QW):
        differing = np.ascontiguousarray(codes_NW[candidates] ^ query)
        distances = np.unpackbits(differing.view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)
        nearest = np.argsort(distances, kind="stable")[:k]
        distances_QK[q, : len(nearest)] = distances[nearest]
        positions_QK[q, : len(nearest)] = candidates[nearest]
    return distances_QK, positions_QK


def bitmap(eligible_N: npt.NDArray[np.bool_]) -> Words:
    padded = np.zeros(-(-len(eligible_N) // 64) * 64, bool)
    padded[: len(eligible_N)] = eligible_N
    return np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64)


def assert_same(found: Nearest, expected: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> None:
    assert found.distances_QK.dtype == np.int32
    assert found.positions_QK.dtype == np.int64
    np.testing.assert_array_equal(found.distances_QK, expected[0])
    np.testing.assert_array_equal(found.positions_QK, expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("words", range(1, 46))
def test_every_width_equals_brute_force_with_padding_and_a_query_remainder(words: int, kernel: KernelName) -> None:
    rng = np.random.default_rng(words)
    codes, queries = random_codes(rng, 32 * 9 + words, words), random_codes(rng, 5, words)
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        assert_same(hamming_topk(index, queries, 17), brute_force(codes, queries, 17))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("documents", [31, 32, 33, 63, 64, 65])
def test_the_zeros_that_fill_the_last_block_are_no_documents(documents: int, queries: int, kernel: KernelName) -> None:
    """They would be the nearest to queries of zeros."""
    codes = random_codes(np.random.default_rng(documents), documents, 2) | np.uint64(1)
    asked = np.zeros((queries, 2), np.uint64)
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        for k in (1, documents):
            assert_same(hamming_topk(index, asked, k), brute_force(codes, asked, k))


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    documents=st.integers(1, 400),
    words=st.integers(1, 13),
    queries=st.integers(1, 9),
    k=st.integers(1, 90),
    share=st.sampled_from([None, 0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_ties_go_to_the_smaller_position_under_any_filter(
    kernel: KernelName, documents: int, words: int, queries: int, k: int, share: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes, asked = random_codes(rng, documents, words, ties=True), random_codes(rng, queries, words, ties=True)
    eligible = None if share is None else rng.random(documents) < share
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        found = hamming_topk(index, asked, k, eligible=None if eligible is None else bitmap(eligible))
    assert_same(found, brute_force(codes, asked, k, eligible))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("words", [1, 2, 3, 5, 8, 11])
def test_a_prefix_search_equals_brute_force_over_the_prefix(words: int, kernel: KernelName) -> None:
    rng = np.random.default_rng(words)
    codes, queries = random_codes(rng, 3000, 11), random_codes(rng, 6, 11)
    expected = brute_force(codes[:, :words], queries[:, :words], 25)
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        assert_same(hamming_topk(index, queries, 25, words=words), expected)
        assert_same(hamming_topk(index, queries[:, :words], 25, words=words), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_give_the_answers_of_one(kernel: KernelName, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "THREAD_BYTES", 1)  # otherwise these codes are too few to be worth a second thread
    rng = np.random.default_rng(threads)
    codes, queries = random_codes(rng, 4_001, 3, ties=True), random_codes(rng, 7, 3, ties=True)
    with HammingIndex.from_codes(codes, kernel=kernel, threads=threads) as index:
        assert_same(hamming_topk(index, queries, 60), brute_force(codes, queries, 60))


def test_a_search_does_not_wait_for_threads_that_are_busy_with_another() -> None:
    codes_NW = random_codes(np.random.default_rng(3), 100_000, 4)
    with HammingIndex.from_codes(codes_NW, threads=2) as index:
        assert index._pool is not None
        release = threading.Event()
        busy = index._pool.submit(release.wait, 60)
        found = hamming_topk(index, codes_NW[:3], 1)
        assert not busy.done()
        release.set()
    assert found.positions_QK[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 1000, 10_000])
def test_k_up_to_ten_thousand(k: int) -> None:
    rng = np.random.default_rng(k)
    codes, queries = random_codes(rng, 20_000, 2), random_codes(rng, 5, 2)
    with HammingIndex.from_codes(codes) as index:
        assert_same(hamming_topk(index, queries, k), brute_force(codes, queries, k))


def test_queries_are_cut_into_passes_that_bound_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "BUFFER_BYTES", 4096)  # five queries a pass at k = 60
    rng = np.random.default_rng(0)
    codes, queries = random_codes(rng, 2_000, 4), random_codes(rng, 23, 4)
    with HammingIndex.from_codes(codes) as index:
        assert_same(hamming_topk(index, queries, 60), brute_force(codes, queries, 60))


@pytest.mark.parametrize("kernel", KERNELS)
def test_descending_distances_make_every_document_a_candidate(kernel: KernelName) -> None:
    """The worst case of the running threshold: each document is nearer than all before it, or as near."""
    bits = np.repeat(np.arange(64, 0, -1), 40)
    codes = np.array([(1 << int(b)) - 1 for b in bits], np.uint64)[:, None]
    queries = np.zeros((4, 1), np.uint64)
    with HammingIndex.from_codes(codes, kernel=kernel) as index:
        assert_same(hamming_topk(index, queries, 50), brute_force(codes, queries, 50))


@given(distances=st.lists(st.integers(0, 64), min_size=1, max_size=60), k=st.integers(1, 60))
@settings(max_examples=100)
def test_selection_is_a_stable_sort_whatever_the_scratch_held(distances: list[int], k: int) -> None:
    k = min(k, len(distances))
    keys = np.array([(d << 32) | i for i, d in enumerate(distances)], np.uint64)
    tally = np.full(65, -1_000_000, np.int32)
    kept, limit = hamming_kernel.select(keys, len(keys), k, max(distances), tally)
    expected = sorted((d, i) for i, d in enumerate(distances))[:k]
    assert keys[:kept].tolist() == [(d << 32) | i for d, i in sorted(expected, key=lambda pair: pair[1])]
    assert int(limit) == expected[-1][0]


def test_a_read_only_map_is_searched_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    codes, queries = random_codes(rng, 1_000, 6), random_codes(rng, 4, 6)
    np.save(tmp_path / "codes.npy", to_blocks(codes))
    (tmp_path / "codes.npy").chmod(0o444)
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r", allow_pickle=False)
    with HammingIndex(mapped, 1_000) as index:
        index.warm_up()
        assert np.shares_memory(index.codes_GWV, mapped)
        assert_same(hamming_topk(index, queries, 10), brute_force(codes, queries, 10))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_index_and_no_queries_give_empty_answers(kernel: KernelName) -> None:
    with HammingIndex.from_codes(np.empty((0, 3), np.uint64), kernel=kernel) as index:
        found = hamming_topk(index, np.zeros((2, 3), np.uint64), 4)
        assert (found.positions_QK == -1).all()
        assert (found.distances_QK == -1).all()
        assert hamming_topk(index, np.zeros((0, 3), np.uint64), 4).positions_QK.shape == (0, 4)


@pytest.fixture
def small_index() -> HammingIndex:
    return HammingIndex.from_codes(np.zeros((100, 4), np.uint64))


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (np.zeros((1, 4), np.uint32), {}, "uint64"),
        (np.zeros((1, 2), np.uint64), {}, r"\(Q, 4\)"),
        (np.zeros(4, np.uint64), {}, r"\(4,\)"),
        (np.zeros((1, 3), np.uint64), {"words": 2}, "2 or 4"),
        (np.zeros((1, 4), np.uint64), {"words": 5}, "4 words"),
        (np.zeros((1, 4), np.uint64), {"words": 0}, "4 words"),
        (np.zeros((1, 4), np.uint64), {"k": 0}, "at least 1"),
        (np.zeros((1, 4), np.uint64), {"eligible": np.zeros(1, np.uint64)}, r"\(2,\) uint64"),
        (np.zeros((1, 4), np.uint64), {"eligible": np.zeros(2, np.int64)}, "int64"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(
    small_index: HammingIndex, queries: Words, options: dict[str, object], message: str
) -> None:
    with pytest.raises(CodeError, match=message):
        hamming_topk(small_index, queries, **({"k": 3} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "documents"),
    [
        (np.zeros((2, 4, 32), np.uint32), 64),
        (np.zeros((2, 4, 16), np.uint64), 32),
        (np.zeros((2, 4, 32), np.uint64), 65),
        (np.zeros((2, 4, 32), np.uint64), 32),
        (np.zeros((32, 4, 2), np.uint64).T, 64),
        (np.zeros((2, 0, 32), np.uint64), 64),
    ],
)
def test_codes_that_are_not_what_they_should_be_are_refused(codes: Words, documents: int) -> None:
    with pytest.raises(CodeError, match=r"codes|blocks"):
        HammingIndex(codes, documents)


def test_unknown_kernels_and_no_threads_are_refused() -> None:
    codes = np.zeros((1, 1, 32), np.uint64)
    with pytest.raises(CodeError, match="unknown kernel"):
        HammingIndex(codes, 3, kernel="cuda")  # type: ignore[arg-type]
    with pytest.raises(CodeError, match="threads"):
        HammingIndex(codes, 3, threads=0)


def test_blocks_and_rows_are_the_same_codes() -> None:
    codes = random_codes(np.random.default_rng(1), 77, 5)
    blocks = to_blocks(codes)
    assert blocks.shape == (3, 5, 32)
    assert blocks[1, 4, 3] == codes[35, 4]
    assert (blocks[2, :, 13:] == 0).all()
    np.testing.assert_array_equal(from_blocks(blocks, 77), codes)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_beyond_the_codes_does_not_grow_with_them(threads: int) -> None:
    peaks = []
    for documents in (20_000, 320_000):
        codes = np.random.default_rng(0).integers(0, 2**64, (documents // 32, 3, 32), dtype=np.uint64)
        with HammingIndex(codes, documents, threads=threads) as index:
            index.warm_up()
            tracemalloc.start()
            hamming_topk(index, np.zeros((64, 3), np.uint64), 10)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 200_000  # the distances of the larger corpus alone would take 40 MB
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.skipif(
    not get_host_cpu_features().get("avx512vpopcntdq"), reason="this processor has no AVX-512 VPOPCNTDQ"
)
def test_the_scan_counts_bits_with_the_widest_instruction() -> None:
    fresh = njit(nogil=True)(hamming_kernel.scan_blocks.py_func)  # a cached kernel shows no assembly
    words, numbers, codes = np.zeros(1, np.uint64), np.zeros(1, np.int64), np.zeros((1, 1, 32), np.uint64)
    fresh(
        codes,
        0,
        1,
        32,
        words[None],
        words[:0],
        1,
        np.zeros((1, 18), np.uint64),
        numbers,
        words,
        hamming_kernel.new_scratch(1, 1),
    )
    assembly = "".join(fresh.inspect_asm().values())
    counted = [line for line in assembly.splitlines() if "vpopcntq" in line]
    assert len([line for line in counted if "zmm" in line]) >= 40  # 4 queries x 4 vectors, unrolled and remainder
