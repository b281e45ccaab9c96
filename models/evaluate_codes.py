"""The packed codes of a bundle, measured: every level by distance and rescored, and what a prefix cascade loses.

Shapes: Q queries, D dimensions, W words, K results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.baselines import Ranked
from models.comparison import CascadeRow
from models.measures import DEPTH
from service.search.cascade import measure_cascade_recall
from service.search.codes import CodeSearch, HammingOptions
from service.search.hybrid import OVERSAMPLING
from service.search.rescoring import Neighbours

SHARES = (0.01, 0.05)  # documents that reach the second stage of a cascade
TOP = 10


def hamming_results(
    codes: CodeSearch, vectors_QD: NDArray[np.float32], batch: int
) -> Iterator[tuple[str, str, Ranked, float]]:
    """Search every level by distance, and by cosine among the nearest.

    Yields:
        level, ranking, what was found, seconds for all queries without their encoding.
    """
    for level in codes.levels:
        for ranking, oversampling in (("distance", None), (f"rescored {OVERSAMPLING}x", OVERSAMPLING)):
            options = HammingOptions(DEPTH, level, oversampling=oversampling)
            started, rows = time.perf_counter(), list[Neighbours]()
            for first in range(0, len(vectors_QD), batch):
                part_QD = vectors_QD[first : first + batch]
                rows += codes.nearest(codes.pack(part_QD, level), options, part_QD)
            yield level, ranking, _ranked(rows), time.perf_counter() - started


def measure_cascades(codes: CodeSearch, vectors_QD: NDArray[np.float32]) -> Iterator[CascadeRow]:
    """Measure which part of the exact ten nearest a cascade finds, for every level and prefix."""
    for level in codes.levels:
        queries_QW, index, layout = codes.pack(vectors_QD, level), codes.indexes[level], codes.layouts[level]
        stages = {
            layout.words_of(dims): dims for dims in reversed(codes.prefixes)
        }  # several prefixes may end in a word
        for words, dims in sorted(stages.items()):
            for share in SHARES:
                if words < layout.words:
                    recall = measure_cascade_recall(index, queries_QW, TOP, words, share)
                    yield CascadeRow(level, dims, words, layout.words, share, recall)


def _ranked(rows: list[Neighbours]) -> Ranked:
    """Return rows as baselines give theirs, padded with -1."""
    positions_QK = np.full((len(rows), DEPTH), -1, np.int64)
    scores_QK = np.zeros((len(rows), DEPTH), np.float32)
    for row, found in enumerate(rows):
        count = len(found.positions_K)
        positions_QK[row, :count] = found.positions_K
        scores_QK[row, :count] = found.similarities_K if found.cosines_K is None else found.cosines_K
    return Ranked(positions_QK, scores_QK)
