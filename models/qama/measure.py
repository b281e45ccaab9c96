"""What an adapter costs in quality: nDCG@10 of its codes and prefixes on judged queries.

Shapes: Q queries, N documents, D dimensions, K results, W words.

Codes are made by `service.model.binarizer` and searched by `service.search.hamming`, the code that serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.qama.start import FloatArray
from models.unit import unit_rows
from service.model.binarizer import Binarizer
from service.model.packing import pack_values
from service.search.hamming import HammingIndex, hamming_topk
from service.search.hybrid import OVERSAMPLING

IntArray = npt.NDArray[np.int64]
CUT = 10
ROWS = 1024


class Judged(NamedTuple):
    """Queries with their relevant documents.

    Attributes:
        documents: (N, D) unit float32.
        queries: (Q, D) unit float32.
        grades: for each query, document row → grade above 0.
    """

    documents: FloatArray
    queries: FloatArray
    grades: list[dict[int, int]]


class Score(NamedTuple):
    """One cell of the tables: `level` is "float" for the adapted float prefix."""

    level: str
    dims: int
    ndcg: float
    rescored: float | None
    bytes: int


def ndcg(ranked_QK: IntArray, grades: list[dict[int, int]]) -> float:
    """Mean nDCG at the width of `ranked_QK`, gain = grade, over queries that have a relevant document."""
    discounts = 1 / np.log2(np.arange(2, ranked_QK.shape[1] + 2))
    values = []
    for row, relevant in zip(ranked_QK, grades, strict=True):
        if relevant:
            gains = np.array([relevant.get(int(document), 0) for document in row])
            ideal = np.sort(list(relevant.values()))[::-1][: len(discounts)]
            values.append((gains * discounts).sum() / (ideal * discounts[: len(ideal)]).sum())
    return float(np.mean(values))


def nearest(queries_QD: FloatArray, documents_ND: FloatArray, k: int = CUT) -> IntArray:
    """Rows of the k documents of greatest dot product, ties by row, (Q, k)."""
    parts = []
    for first in range(0, len(queries_QD), ROWS):
        scores = queries_QD[first : first + ROWS] @ documents_ND.T
        parts.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(parts)


def rescore(candidates_QK: IntArray, judged: Judged, k: int = CUT) -> IntArray:
    """Order candidates by the cosine of the original vectors, keep k, (Q, k)."""
    cosines = np.einsum("qd,qkd->qk", judged.queries, judged.documents[candidates_QK])
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates_QK, order, axis=1)


def baseline(judged: Judged) -> float:
    """NDCG@10 of exact cosine search over the original float vectors: the 100 % of every table."""
    return ndcg(nearest(judged.queries, judged.documents), judged.grades)


def measure(binarizer: Binarizer, judged: Judged) -> Iterator[Score]:
    """Score every prefix as floats and as codes of every level."""
    adapted = binarizer.adapt(judged.documents), binarizer.adapt(judged.queries)
    for dims in binarizer.prefixes:
        documents, queries = (unit_rows(part[:, :dims]) for part in adapted)
        yield Score("float", dims, ndcg(nearest(queries, documents), judged.grades), None, 4 * dims)
    for level, layout in binarizer.layouts.items():
        codes = [pack_values(binarizer.quantise(part, layout), layout) for part in adapted]
        index = HammingIndex.from_codes(codes[0])
        for dims, words in zip(layout.prefix_dims, layout.prefix_words, strict=True):
            found = hamming_topk(index, codes[1][:, :words].copy(), CUT * OVERSAMPLING, words).positions_QK
            quality = ndcg(found[:, :CUT], judged.grades)
            yield Score(level, dims, quality, ndcg(rescore(found, judged), judged.grades), 8 * words)


def float_baselines(judged: Judged) -> dict[str, float]:
    """NDCG@10 of plain FP16 and Int8 copies of the original vectors (Int8: one scale for all dimensions)."""
    scale = np.abs(judged.documents).max() / 127

    def half(vectors: FloatArray) -> FloatArray:
        return vectors.astype(np.float16).astype(np.float32)

    def whole(vectors: FloatArray) -> FloatArray:
        steps: FloatArray = np.clip(np.rint(vectors / scale), -127, 127)
        return steps

    return {
        title: ndcg(nearest(copy(judged.queries), copy(judged.documents)), judged.grades)
        for title, copy in (("FP16", half), ("Int8", whole))
    }
