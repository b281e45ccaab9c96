"""Exact Hamming search over packed codes.

Shapes: Q queries, N documents, W words, G blocks of V = 32 documents, K results, C slots of a candidate buffer.

The k nearest documents of each query by Hamming distance, ties by document order (the smaller position first): always
the answer of a brute-force search. The blocks are split over a thread pool of our own; each thread runs a serial kernel
that releases the GIL. Memory beyond the mapped codes does not depend on N: candidate buffers of `BUFFER_BYTES`
a thread (of four queries, where those of many results are larger), and the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from service.model.layout import CodeError
from service.model.packing import BLOCK_DOCUMENTS, CodeArray, to_blocks

KernelName = Literal["auto", "numba", "numpy"]
MAX_DOCUMENTS = (1 << 32) - 1  # a candidate's key keeps its position in 32 bits, all ones meaning "none"
BUFFER_BYTES = 1 << 25
THREAD_BYTES = 1 << 20  # codes compared by one thread at least: about the cost of waking another
CHUNKS_PER_THREAD = 8  # so that a thread that was held up leaves work to the others
Words = CodeArray
EVERYTHING = np.uint64(1 << 31)  # a threshold that no distance reaches
_NONE = np.uint64((1 << 64) - 1)
_NO_FILTER = np.empty(0, np.uint64)
_NO_FILTER.flags.writeable = False


class Kernel(Protocol):
    """What `hamming_kernel` and `hamming_numpy` both offer."""

    new_scratch: Callable[[int, int], Any]
    scan_blocks: Callable[..., None]
    rest_distances: Callable[..., npt.NDArray[np.int64]]


class Nearest(NamedTuple):
    """Results, nearest first; rows with fewer than K eligible documents end in -1.

    Attributes:
        distances_QK: int32 differing bits, -1 where there is no document.
        positions_QK: int64 document positions, -1 where there is no document.
    """

    distances_QK: npt.NDArray[np.int32]
    positions_QK: npt.NDArray[np.int64]


def load_kernel(name: KernelName = "auto") -> Kernel:
    """Import a kernel; "auto" takes numba's where numba can be imported.

    Raises:
        CodeError: unknown name.
        ImportError: "numba" was asked for by name and is missing.
    """
    if name not in ("auto", "numba", "numpy"):
        raise CodeError(f"unknown kernel {name!r}: choose auto, numba or numpy")
    if name != "numpy":
        try:
            from service.search import hamming_kernel

            return cast("Kernel", hamming_kernel)
        except ImportError:
            if name == "numba":
                raise
    from service.search import hamming_numpy

    return cast("Kernel", hamming_numpy)


class HammingIndex:
    """Packed codes of one level, ready to be searched.

    Args:
        codes_GWV: (ceil(N / 32), W, 32) uint64, C-contiguous, as `packing.to_blocks` makes it; usually a read-only
            memory map. It is neither copied nor changed.
        documents: N.
        threads: cores that one search may use.
        kernel: which implementation scans.

    Raises:
        CodeError: codes of another shape, type or order, or a number of documents that they do not hold.
    """

    def __init__(
        self, codes_GWV: npt.NDArray[Any], documents: int, *, threads: int = 1, kernel: KernelName = "auto"
    ) -> None:
        _check_blocks(codes_GWV, documents)
        if threads < 1:
            raise CodeError(f"threads must be at least 1, got {threads}")
        self.codes_GWV = _read_only(codes_GWV)
        self.documents = documents
        self.threads = threads
        self.kernel = load_kernel(kernel)
        self._pool = ThreadPoolExecutor(threads - 1, "hamming") if threads > 1 else None

    @classmethod
    def from_codes(cls, codes_NW: CodeArray, *, threads: int = 1, kernel: KernelName = "auto") -> HammingIndex:
        """Index row-major codes, reordering a copy of them."""
        return cls(to_blocks(codes_NW), len(codes_NW), threads=threads, kernel=kernel)

    @property
    def words(self) -> int:
        """Words W of a stored code."""
        return int(self.codes_GWV.shape[1])

    def close(self) -> None:
        """Stop the threads; searches that run are finished first."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Compile the kernels and touch every page of the codes; call it before answering queries."""
        hamming_topk(self, np.zeros((5, self.words), np.uint64), 1)  # five queries: a group of four and a single one

    def run(self, work: Callable[[], Words], workers: int) -> list[Words]:
        """Run the same work on several threads, this one included.

        All of them draw from one heap of work, so a thread that has not begun when this one ends has nothing to do: it
        is busy with another search, which nobody waits for here.
        """
        futures = [self._pool.submit(work) for _ in range(workers - 1)] if self._pool is not None else []
        return [work(), *(future.result() for future in futures if not future.cancel())]


def hamming_topk(
    index: HammingIndex,
    queries_QW: npt.NDArray[Any],
    k: int,
    words: int | None = None,
    eligible: npt.NDArray[Any] | None = None,
) -> Nearest:
    """Find the k nearest documents of each query.

    Args:
        index: codes to search.
        queries_QW: uint64, as wide as the stored codes, or `words` wide.
        k: results a query, 1 or more; rows are filled up with -1 where fewer documents are eligible.
        words: compare the first so many words only (a Matryoshka prefix, `CodeLayout.words_of`); None: all.
        eligible: bitmap of documents to consider, ceil(N / 64) uint64, bit i of word w is document 64w + i.

    Raises:
        CodeError: wrong shapes, types, k or words.
    """
    compared = index.words if words is None else words
    queries_QW = check_queries(index, queries_QW, compared)
    bitmap = check_bitmap(index, eligible)
    if k < 1:
        raise CodeError(f"k must be at least 1, got {k}")
    keys_QK = np.full((len(queries_QW), k), _NONE, np.uint64)
    kept = min(k, index.documents)
    for rows in _passes(len(queries_QW), kept):
        keys_QK[rows, :kept] = _scan(index, queries_QW[rows], kept, bitmap)
    return _results(keys_QK)


def _passes(queries: int, k: int) -> Iterator[slice]:
    """Cut the queries so that one pass's candidate buffers keep to `BUFFER_BYTES`."""
    step = max(4, BUFFER_BYTES // (8 * _slots(k)))
    return (slice(first, first + step) for first in range(0, queries, step))


def _slots(k: int) -> int:
    """Candidates that a buffer holds before it is cut to k: measured best between 1.5 k and 2 k."""
    return k + k // 2 + 16


def _scan(index: HammingIndex, queries_QW: Words, k: int, eligible: Words) -> Words:
    """One pass: the k smallest keys of each query, sorted; `_NONE` where there are fewer."""
    blocks = len(index.codes_GWV)
    compared_bytes = queries_QW.size * 8 * BLOCK_DOCUMENTS * blocks
    workers = min(index.threads, 1 + compared_bytes // THREAD_BYTES)
    step = max(1, -(-blocks // (workers * CHUNKS_PER_THREAD))) if workers > 1 else max(1, blocks)
    tickets = itertools.count(0, step)  # next() is atomic; each thread draws ascending blocks

    def work() -> Words:
        keys_QC = np.empty((len(queries_QW), _slots(k)), np.uint64)
        counts_Q = np.zeros(len(queries_QW), np.int64)
        thresholds_Q = np.full(len(queries_QW), EVERYTHING)
        scratch = index.kernel.new_scratch(queries_QW.shape[1], index.words)
        while (first := next(tickets)) < blocks:
            last = min(first + step, blocks)
            index.kernel.scan_blocks(
                index.codes_GWV, first, last, index.documents, queries_QW, eligible, k,
                keys_QC, counts_Q, thresholds_Q, scratch,
            )  # fmt: skip
        keys_QC[np.arange(keys_QC.shape[1]) >= counts_Q[:, None]] = _NONE
        keys_QC.sort(axis=1)
        return keys_QC[:, :k]

    parts = index.run(work, workers)
    return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts, axis=1), axis=1)[:, :k]


def _results(keys_QK: Words) -> Nearest:
    distances_QK = (keys_QK >> np.uint64(32)).astype(np.uint32).view(np.int32)  # `_NONE` turns into -1
    positions_QK = (keys_QK & np.uint64(0xFFFFFFFF)).astype(np.int64)
    positions_QK[distances_QK < 0] = -1
    return Nearest(distances_QK, positions_QK)


def check_queries(index: HammingIndex, queries_QW: npt.NDArray[Any], words: int) -> Words:
    """Check packed queries against an index; give their first `words` words, contiguous and read-only.

    Raises:
        CodeError: the kernel would read past them otherwise, silently.
    """
    if not 1 <= words <= index.words:
        raise CodeError(f"the codes have {index.words} words, asked to compare the first {words}")
    if queries_QW.dtype != np.uint64 or queries_QW.ndim != 2 or queries_QW.shape[1] not in (words, index.words):
        widths = f"{index.words}" if words == index.words else f"{words} or {index.words}"
        raise CodeError(f"queries must be (Q, {widths}) uint64, got {queries_QW.shape} {queries_QW.dtype}")
    return _read_only(np.ascontiguousarray(queries_QW[:, :words]))


def check_bitmap(index: HammingIndex, eligible: npt.NDArray[Any] | None) -> Words:
    """Check a document bitmap; give it contiguous and read-only, empty for None.

    Raises:
        CodeError: another type or length.
    """
    if eligible is None:
        return _NO_FILTER
    needed = -(-index.documents // 64)
    if eligible.dtype != np.uint64 or eligible.shape != (needed,):
        raise CodeError(
            f"the bitmap of {index.documents} documents is ({needed},) uint64, got {eligible.shape} {eligible.dtype}"
        )
    return _read_only(np.ascontiguousarray(eligible))


def _check_blocks(codes_GWV: npt.NDArray[Any], documents: int) -> None:
    if codes_GWV.dtype != np.uint64 or codes_GWV.ndim != 3 or codes_GWV.shape[2] != BLOCK_DOCUMENTS:
        raise CodeError(f"stored codes must be (G, W, 32) uint64, got {codes_GWV.shape} {codes_GWV.dtype}")
    if not codes_GWV.flags.c_contiguous or not codes_GWV.flags.aligned or codes_GWV.shape[1] < 1:
        raise CodeError(f"stored codes must be C-contiguous, aligned and one word wide at least, got {codes_GWV.shape}")
    if not 0 <= documents < MAX_DOCUMENTS or -(-documents // BLOCK_DOCUMENTS) != len(codes_GWV):
        raise CodeError(f"{len(codes_GWV)} blocks of 32 do not hold {documents} documents")


def _read_only(array: npt.NDArray[np.uint64]) -> Words:
    """View as a plain read-only array: numba compiles a kernel for each kind of array, and this makes it one kind."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
