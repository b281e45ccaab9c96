"""What one training step sees: queries, documents, and which document belongs to which query.

Shapes: Q queries, N documents of the batch, D dimensions, P train pairs.

Three ideas of ours stand behind it. **Neighbourhoods**: the documents of a batch come from the neighbourhoods of a few
queries or documents, because ranking is decided between near documents and a random batch holds almost none.
**Mixed queries**: where there are no train queries, unit vectors between a document and a neighbour of it take their
place. **No state**: a batch is a function of (seed, step), so that a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.lines import DataError
from models.qama.recipe import BatchTable
from models.qama.start import FloatArray
from models.unit import unit_rows

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
SCORES = 1 << 24  # of anchors with documents, held at once while neighbours are looked for: 192 MB with their order


@dataclass(frozen=True)
class TrainVectors:
    """Unit vectors to learn from; test queries never belong here.

    Attributes:
        documents: (N, D) float32.
        queries: (Q, D) float32 train queries, or None.
        pairs: (P, 2) int64, rows of `queries` and `documents` that belong together, or None.
    """

    documents: FloatArray
    queries: FloatArray | None = None
    pairs: IntArray | None = None

    def __post_init__(self) -> None:
        for name, vectors in (("documents", self.documents), ("train queries", self.queries)):
            if vectors is not None:
                _check_vectors(name, vectors, self.documents.shape[1:])
        if self.pairs is None:
            return
        if self.queries is None or self.pairs.ndim != 2 or self.pairs.shape[1] != 2 or not len(self.pairs):
            raise DataError(f"pairs must be (P, 2) rows of queries and documents, got {self.pairs.shape}")
        if (self.pairs < 0).any() or (self.pairs >= (len(self.queries), len(self.documents))).any():
            raise DataError(f"pairs name rows outside {len(self.queries)} queries and {len(self.documents)} documents")


@dataclass(frozen=True)
class Batch:
    """One step's vectors.

    Attributes:
        queries_QD: unit float32.
        documents_ND: unit float32, no document twice.
        positives_Q: column of each query's own document.
        others_QN: documents that the train pairs hold relevant to a query beside its own; no negatives of eq. 14.
    """

    queries_QD: FloatArray
    documents_ND: FloatArray
    positives_Q: IntArray
    others_QN: BoolArray


class BatchSource:
    """Draws batches.

    Args:
        vectors: what to draw from.
        table: the recipe's `[batch]`.
        seed: with the step, all that a batch depends on.
    """

    def __init__(self, vectors: TrainVectors, table: BatchTable, seed: int) -> None:
        self.vectors, self.table, self.seed = vectors, table, seed

    def batch(self, step: int) -> Batch:
        """Draw the batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        pairs = self._pairs(rng)
        real = self.vectors.documents[:0] if self.vectors.queries is None else self.vectors.queries[pairs[:, 0]]
        groups_GM = self._groups(rng, real)
        mixed, owners = self._mix(rng, groups_GM, self.table.queries - len(pairs))
        chosen, places = np.unique(np.concatenate([pairs[:, 1], owners, groups_GM.ravel()]), return_inverse=True)
        queries = np.concatenate([real, mixed])
        positives = places[: len(queries)].astype(np.int64)
        others = self._others(pairs[:, 0], chosen, positives)
        return Batch(queries, self.vectors.documents[chosen], positives, others)

    def _pairs(self, rng: np.random.Generator) -> IntArray:
        """Train pairs of the batch; none where there are no train queries."""
        known = self.vectors.pairs
        if known is None:
            return np.zeros((0, 2), np.int64)
        return known[rng.integers(0, len(known), round(self.table.queries * self.table.real_share))]

    def _others(self, asked: IntArray, chosen: IntArray, positives_Q: IntArray) -> BoolArray:
        """Relevant documents beside the positive (Q, N); rows after those of the train queries `asked` have none."""
        others_QN = np.zeros((len(positives_Q), len(chosen)), np.bool_)
        if self.vectors.pairs is not None:
            width = len(self.vectors.documents)  # a pair as one number
            known = self.vectors.pairs @ (width, 1)
            others_QN[: len(asked)] = np.isin(asked[:, None] * width + chosen, known)
        others_QN[np.arange(len(positives_Q)), positives_Q] = False
        return others_QN

    def _groups(self, rng: np.random.Generator, real: FloatArray) -> IntArray:
        """Documents in rows of neighbours (G, M); one row of any documents where groups are off.

        Half of the neighbourhoods are those of the batch's train queries `real`, where it has so many.
        """
        documents, groups = len(self.vectors.documents), self.table.groups
        if not groups:
            return rng.integers(0, documents, (1, self.table.documents))
        anchors = self.vectors.documents[rng.integers(0, documents, groups)]
        asked = real[: groups // 2]
        anchors[: len(asked)] = asked
        near = nearest_documents(anchors, self.vectors.documents, self.table.neighbours)
        each = min(max(2, self.table.documents // groups), near.shape[1])
        picks = rng.random(near.shape).argsort(axis=1)[:, :each]
        return np.take_along_axis(near, picks, axis=1)

    def _mix(self, rng: np.random.Generator, groups_GM: IntArray, count: int) -> tuple[FloatArray, IntArray]:
        """Queries between two documents of a group, and the one that each is nearer to."""
        rows = rng.integers(0, len(groups_GM), count)
        first, second = groups_GM[rows[:, None], rng.integers(0, groups_GM.shape[1], (count, 2))].T
        share = rng.uniform(0, self.table.mixup, (count, 1))
        dims = self.vectors.documents.shape[1]
        mixed = (1 - share) * self.vectors.documents[first] + share * self.vectors.documents[second]
        mixed += self.table.noise / np.sqrt(dims) * rng.standard_normal((count, dims))
        return unit_rows(mixed), first


def nearest_documents(anchors_AD: FloatArray, documents_ND: FloatArray, count: int) -> IntArray:
    """Rows of the `count` documents nearest to each anchor by cosine, in no order, (A, count)."""
    count = min(count, len(documents_ND))
    near = np.empty((len(anchors_AD), count), np.int64)
    rows = max(1, SCORES // len(documents_ND))
    for first in range(0, len(anchors_AD), rows):
        scores = anchors_AD[first : first + rows] @ documents_ND.T
        order = np.argpartition(np.negative(scores, out=scores), count - 1, axis=1)
        near[first : first + rows] = order[:, :count]
    return near


def unit_vectors(vectors_ND: npt.NDArray[Any]) -> FloatArray:
    """Float32 rows of unit length.

    Raises:
        DataError: not a two-dimensional array of floats, or rows that are zero, NaN or infinite.
    """
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind != "f" or not len(vectors_ND):
        raise DataError(f"vectors must be floats of shape (N, D), got {vectors_ND.shape} {vectors_ND.dtype}")
    vectors = vectors_ND.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(norms)} vectors are zero, NaN or infinite, the first is row {bad[0]}: leave them out"
        )
    return unit_rows(vectors)


def _check_vectors(name: str, vectors: FloatArray, width: tuple[int, ...]) -> None:
    if vectors.ndim != 2 or vectors.shape[1:] != width or not len(vectors) or vectors.dtype != np.float32:
        raise DataError(f"{name} must be float32 of shape (N, {width}), got {vectors.shape} {vectors.dtype}")
    norms = np.linalg.norm(vectors, axis=1)
    if not (np.abs(norms - 1) < 1e-3).all():
        raise DataError(f"{name} must be unit vectors, their lengths are {norms.min():.3g}..{norms.max():.3g}")
