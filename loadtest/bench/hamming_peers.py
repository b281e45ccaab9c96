"""The contenders of `rhumb bench hamming`: our scan, and every other way to the k nearest documents.

Shapes: N documents, Q queries, W words, D dimensions, K results. All run on one core unless they say otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from service.search.hamming import HammingIndex, hamming_topk

Words = npt.NDArray[np.uint64]
Distances = npt.NDArray[Any]
FP32_DIMS = 768  # 12 words at 1 bit; 20, 24 and 36 words are the same vectors' hybrid, 1.5 and 2 bit
NUMPY_CHUNK = 65_536  # documents: the temporaries take tens of megabytes, whatever N is
FEW = 2  # queries that stand for all where one costs as much as another
PATIENCE_SECONDS = 3.0  # of one contender on one workload
RUN_SECONDS = 0.002
NEVER_BLAS, ALWAYS_BLAS = 1 << 30, 0


@dataclass
class Contender:
    """One way to search, timed on `queries` of the workload's queries and scaled to all of them.

    Attributes:
        name: as the report knows it.
        search: runs the timed queries; gives their distances (queries, K) for comparison, None where it has others.
        queries: how many of the workload's queries it runs.
        seconds: wall-clock seconds of each run.
        repeats: searches of a run, more than one where a single one is too short to time.
    """

    name: str
    search: Callable[[], Distances | None]
    queries: int
    seconds: list[float] = field(default_factory=list)
    repeats: int = 1

    def run(self) -> Distances | None:
        """Note the time of a run; give what it found."""
        started = time.perf_counter()
        for _ in range(self.repeats):
            found = self.search()
        self.seconds.append((time.perf_counter() - started) / self.repeats)
        return found

    def first_run(self) -> Distances | None:
        """Run to warm up and to choose the repeats; its time counts only where another run would take too long."""
        found = self.run()
        if self.seconds[0] < PATIENCE_SECONDS:
            self.repeats = max(1, int(RUN_SECONDS / self.seconds.pop()))
        return found

    @property
    def tired(self) -> bool:
        """Whether it has used up its time on this workload."""
        return sum(self.seconds) * self.repeats >= PATIENCE_SECONDS

    def median(self, queries: int) -> float:
        """Median seconds for so many queries."""
        return float(np.median(self.seconds)) * queries / self.queries


Peer = Callable[[Words, int], list[Contender]]  # makes the contenders of one workload: queries_QW, k


def missing_peers() -> list[str]:
    """Peers that are not installed here."""
    return [name for name in ("faiss", "usearch") if find_spec(name) is None]


def rhumb(index: HammingIndex) -> Peer:
    """Our scan with as many threads as the index has."""
    name = "rhumb" if index.threads == 1 else f"rhumb x{index.threads}"
    return lambda queries_QW, k: [
        Contender(name, lambda: hamming_topk(index, queries_QW, k).distances_QK, len(queries_QW))
    ]


def paper_numpy(codes_NW: Words) -> Peer:
    """The paper's way (section 3.6.3): xor, bitwise_count and argpartition, in chunks that spare the memory."""

    def search_one(query_W: Words, k: int) -> Distances:
        distances_N = np.empty(len(codes_NW), np.uint16)
        for first in range(0, len(codes_NW), NUMPY_CHUNK):
            differing = codes_NW[first : first + NUMPY_CHUNK] ^ query_W
            distances_N[first : first + NUMPY_CHUNK] = np.bitwise_count(differing).sum(axis=1, dtype=np.uint16)
        return np.sort(distances_N[np.argpartition(distances_N, k - 1)[:k]])

    def make(queries_QW: Words, k: int) -> list[Contender]:
        few = queries_QW[:FEW]
        return [Contender("numpy", lambda: np.stack([search_one(query, k) for query in few]), len(few))]

    return make


def faiss_binary(codes_NW: Words) -> Peer:
    """IndexBinaryFlat of faiss with both of its selections, by heap and by counting."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexBinaryFlat(codes_NW.shape[1] * 64)
    index.add(codes_NW.view(np.uint8))

    def make(queries_QW: Words, k: int) -> list[Contender]:
        queries = queries_QW.view(np.uint8)

        def search_by(heap: bool) -> Distances:
            index.use_heap = heap
            return np.sort(index.search(queries, k)[0], axis=1)

        return [
            Contender("faiss heap", lambda: search_by(True), len(queries)),
            Contender("faiss count", lambda: search_by(False), len(queries)),
        ]

    return make


def usearch_exact(codes_NW: Words) -> Peer:
    """Exact search of usearch over packed bits."""
    from usearch.index import MetricKind, search

    documents = codes_NW.view(np.uint8)

    def make(queries_QW: Words, k: int) -> list[Contender]:
        few = queries_QW[:FEW].view(np.uint8)

        def run() -> Distances:
            matches = search(documents, few, k, MetricKind.Hamming, exact=True, threads=1)
            return np.atleast_2d(matches.distances).astype(np.int64)

        return [Contender("usearch", run, len(few))]

    return make


def fp32_flat(documents: int) -> Peer:
    """FP32 inner product by faiss over 768 dimensions, with BLAS and without: the tuned one is the quicker."""
    import faiss

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    index = faiss.IndexFlatIP(FP32_DIMS)
    for first in range(0, documents, NUMPY_CHUNK):  # in parts: the vectors exist once, in the index
        index.add(rng.random((min(NUMPY_CHUNK, documents - first), FP32_DIMS), dtype=np.float32))

    def make(queries_QW: Words, k: int) -> list[Contender]:
        few = min(len(queries_QW), 64)  # BLAS has all it needs; beyond, time is proportional to the queries
        asked = rng.random((few, FP32_DIMS), dtype=np.float32)

        def search_with(threshold: int) -> None:
            faiss.cvar.distance_compute_blas_threshold = threshold
            index.search(asked, k)

        return [
            Contender("fp32 plain", lambda: search_with(NEVER_BLAS), few),
            Contender("fp32 blas", lambda: search_with(ALWAYS_BLAS), few),
        ]

    return make
