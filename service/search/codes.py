"""Hamming search of a bundle: from vectors to packed codes to the nearest documents.

Legend: Q queries, N documents, D vector dimensions, W words, K results.

`hamming.py` scans any codes; here are those of a bundle with the adapter that made them. Answers are exact, ties by
document order, unless a cascade is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.index.artefact import ArtefactError
from service.index.bundle import Bundle
from service.index.codes import open_binarizer
from service.model.binarizer import Binarizer
from service.model.layout import CodeLayout
from service.model.packing import CodeArray
from service.ops.cpus import available_cpus
from service.search.cascade import cascade_topk
from service.search.filters import WORD, DocumentFilter
from service.search.hamming import HammingIndex, Nearest, hamming_topk
from service.search.rescoring import Neighbours, rescore

MAX_NEAREST = 10_000
MAX_OVERSAMPLING = 100
PREFERRED_LEVEL = "1"  # a third of 2 bit's memory; rescoring gives back what it loses


@dataclass(frozen=True)
class Cascade:
    """The first stage of a cascade: compare a prefix of `dims` dimensions, keep a `share` of the documents."""

    dims: int
    share: float


@dataclass(frozen=True)
class HammingOptions:
    """How to search packed codes; the same for every query of a batch.

    Attributes:
        top_k: documents wanted, 1 to 10,000; all where the bundle holds fewer.
        level: level of the codes; None for the bundle's default.
        dims: Matryoshka prefix that is compared; None for the whole code.
        eligible: the documents that may be found; None for all.
        oversampling: rank so many times `top_k` candidates by cosine, 1 to 100; None ranks by distance.
        cascade: first stage of a cascade, which is not exact, and faster where few are kept; None scans whole codes.

    Raises:
        ValueError: a value is outside of its range, or a cascade is asked to compare a prefix only.
    """

    top_k: int = 10
    level: str | None = None
    dims: int | None = None
    eligible: DocumentFilter | None = None
    oversampling: int | None = None
    cascade: Cascade | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_NEAREST:
            raise ValueError(f"top_k {self.top_k} is not between 1 and {MAX_NEAREST}")
        if self.oversampling is not None and not 1 <= self.oversampling <= MAX_OVERSAMPLING:
            raise ValueError(f"oversampling {self.oversampling} is not between 1 and {MAX_OVERSAMPLING}")
        if self.cascade is not None and self.dims is not None:
            raise ValueError("a cascade ends with whole codes: leave dims out")


class CodeSearch:
    """Searches the packed codes of an open bundle that has some; threads may share it.

    Args:
        bundle: open, and stays so while this is used.
        binarizer: of its adapter, `open_binarizer`.
        threads: cores that one scan may use; None for every CPU that this process may use.

    Raises:
        ArtefactError: stored codes are not as wide as the adapter's.
    """

    def __init__(self, bundle: Bundle, binarizer: Binarizer, threads: int | None = None) -> None:
        self.binarizer, self.vectors_ND = binarizer, bundle.vectors
        self.layouts = {level: _checked_layout(bundle, binarizer, level) for level in bundle.codes}
        cores = available_cpus() if threads is None else threads
        documents = bundle.manifest.documents
        self.indexes = {level: HammingIndex(bundle.codes[level], documents, threads=cores) for level in self.layouts}

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that the bundle has codes of."""
        return tuple(self.layouts)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Matryoshka dimensions that codes can be cut to, ascending; the last is D."""
        return self.binarizer.prefixes

    @property
    def default_level(self) -> str:
        """The level that is searched when none is named: 1 bit, or the bundle's first."""
        return PREFERRED_LEVEL if PREFERRED_LEVEL in self.layouts else self.levels[0]

    def layout(self, level: str | None = None) -> CodeLayout:
        """Return the layout of a level's codes, None for the default; raises ValueError for one that is not there."""
        chosen = self.default_level if level is None else level
        if chosen not in self.layouts:
            raise ValueError(
                f"this bundle has no codes of level {chosen}: choose from {', '.join(self.levels)}, "
                "or index again with an adapter that offers it"
            )
        return self.layouts[chosen]

    def pack(self, vectors_QD: NDArray[np.float32], level: str | None = None) -> CodeArray:
        """Return the codes (Q, W) uint64 of vectors; raises ValueError for a bad level, width or vector."""
        return self.binarizer.codes(vectors_QD, self.layout(level).level)

    def nearest(
        self, codes_QW: CodeArray, options: HammingOptions, vectors_QD: NDArray[np.float32] | None = None
    ) -> list[Neighbours]:
        """Find the nearest documents of each query.

        Args:
            codes_QW: (Q, W) uint64 of the options' level, whole or cut to the options' prefix.
            options: how to search.
            vectors_QD: (Q, D) float32 unit vectors of the queries; needed for rescoring only.

        Raises:
            ValueError: an unknown level or prefix, codes of another width, or nothing to rescore with.
        """
        if options.oversampling is not None and vectors_QD is None:
            raise ValueError("rescoring needs the queries' vectors: give texts or vectors, or leave it out")
        layout = self.layout(options.level)
        found = self._scan(codes_QW, layout, options)
        rows = [_row(found, query, layout.bits_of(options.dims)) for query in range(len(codes_QW))]
        if options.oversampling is None or vectors_QD is None:
            return rows
        return [
            rescore(row, vector_D, self.vectors_ND, options.top_k)
            for row, vector_D in zip(rows, vectors_QD, strict=True)
        ]

    def warm_up(self) -> None:
        """Compile the kernels and touch every page of the codes."""
        for level, index in self.indexes.items():
            index.warm_up()
            query_1W = np.zeros((1, index.words), np.uint64)
            if self._has_cascade(level):
                cascade_topk(index, query_1W, 1, self.layouts[level].prefix_words[0], 1e-9)

    def close(self) -> None:
        """Stop the threads."""
        for index in self.indexes.values():
            index.close()

    def _has_cascade(self, level: str) -> bool:
        layout = self.layouts[level]
        return layout.prefix_words[0] < layout.words

    def _scan(self, codes_QW: CodeArray, layout: CodeLayout, options: HammingOptions) -> Nearest:
        index = self.indexes[layout.level]
        wanted = min(index.documents, options.top_k * (options.oversampling or 1))
        bitmap = None if options.eligible is None else bitmap_of(options.eligible)
        if options.cascade is None:
            return hamming_topk(index, codes_QW, wanted, layout.words_of(options.dims), bitmap)
        first_words = layout.words_of(options.cascade.dims)
        return cascade_topk(index, codes_QW, wanted, first_words, options.cascade.share, bitmap)


def open_code_search(bundle: Bundle, threads: int | None = None) -> CodeSearch | None:
    """Return the search over a bundle's codes, or None for a bundle without any.

    Raises:
        ArtefactError: the adapter belongs to another encoder or to other codes.
    """
    if not bundle.codes:
        return None
    binarizer = open_binarizer(bundle.model)
    if binarizer is None:
        raise ArtefactError(f"bundle '{bundle.path}' has packed codes and no adapter: index the corpus again")
    return CodeSearch(bundle, binarizer, threads)


def bitmap_of(eligible: DocumentFilter) -> NDArray[np.uint64]:
    """Return a filter as the Hamming scan reads it: one word for every 64 documents, none beyond."""
    return eligible.words_W[: -(-eligible.documents // WORD)]


def unit_vectors(vectors: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Return float32 unit rows of finite numbers of any size.

    Raises:
        ValueError: a vector is zero, or holds NaN or an infinity; the message numbers it.
    """
    rows_QD: NDArray[Any] = np.asarray(vectors, np.float64)
    if rows_QD.ndim != 2 or not rows_QD.shape[1]:
        raise ValueError("vectors are rows of the same width, one number at least")
    largest_Q1 = np.abs(rows_QD).max(axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(largest_Q1) & (largest_Q1 > 0)))
    if len(bad):
        raise ValueError(f"{len(bad)} vectors are zero, NaN or infinite, the first is number {bad[0]}: leave them out")
    scaled_QD = rows_QD / largest_Q1  # before squaring, which would overflow or vanish
    unit_QD: NDArray[np.float32] = (scaled_QD / np.linalg.norm(scaled_QD, axis=1, keepdims=True)).astype(np.float32)
    return unit_QD


def _row(found: Nearest, query: int, bits: int) -> Neighbours:
    is_found = found.positions_QK[query] >= 0
    distances_K = found.distances_QK[query, is_found]
    similarities_K = (1 - distances_K / bits).astype(np.float32)
    return Neighbours(found.positions_QK[query, is_found], distances_K, similarities_K, None)


def _checked_layout(bundle: Bundle, binarizer: Binarizer, level: str) -> CodeLayout:
    layout, words = binarizer.layout(level), bundle.codes[level].shape[1]
    if words != layout.words:
        raise ArtefactError(
            f"bundle '{bundle.path}' has codes of {words} words at level {level}, its adapter makes {layout.words}: "
            "index the corpus again with this model"
        )
    return layout
