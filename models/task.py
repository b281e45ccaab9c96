"""What an evaluation asks of every system: settings, judged queries, documents, vectors.

Shapes: Q queries, N documents (in the order of the bundle), D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data import DataError, Dataset, Document, Qrels, folded, read_qrels, read_queries, read_vectors
from models.lines import refuse_unknown
from service.index.bundle import Bundle, Model, open_model
from service.model.encoder import Encoded, Encoder
from service.ops.progress import progress_bar

RANKINGS = ("lexicographic", "cosine", "fused")  # the service's
SAMPLED = "sampled"  # as lexicographic, but a leaf's documents in an order drawn at random (HHQ, section 3.4)
BEAMS = (10, 20, 50, 100)
MAX_BEAM = 1000
ORDER_SEED = 0  # of the judged queries, so that the first so many are a sample: files often follow the corpus
KEPT_BYTES = 1 << 30  # of encoded queries that are kept from walk to walk


@dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
        split: name of the qrels file.
        scorings: of the walk; empty for all that the bundle offers.
        rankings: of the walk's candidates.
        beams: beam widths.
        baselines: BM25 and exact search beside the walk.
        codes: Hamming searches, where the bundle has packed codes.
        words: the modes `lexical` and `hybrid`, where the bundle has an index of words.
        untuned: a model folder, or a folder with docs.npy, docs.ids.txt, queries_<split>.npy and its ids.
        free_queries: decode so many queries, a sample, without the trie; 0 leaves the share of valid IDs out.
        batch: queries of a call.
        limit: evaluate so many judged queries only, always the same sample; 0 for all.
        threads: of the pipeline.
        runs: folder for TREC runs, one file a row.
    """

    split: str = "test"
    scorings: tuple[str, ...] = ()
    rankings: tuple[str, ...] = RANKINGS
    beams: tuple[int, ...] = BEAMS
    baselines: bool = True
    codes: bool = True
    words: bool = True
    untuned: Path | None = None
    free_queries: int = 500
    batch: int = 32
    limit: int = 0
    threads: int = 1
    runs: Path | None = None

    def __post_init__(self) -> None:
        for ranking in self.rankings:
            if ranking not in (*RANKINGS, SAMPLED):
                raise DataError(f"ranking {ranking!r}: must be one of {', '.join((*RANKINGS, SAMPLED))}")
        if not self.beams or any(not 1 <= beam <= MAX_BEAM for beam in self.beams):
            raise DataError(f"beams {list(self.beams)}: need at least one width of 1 to {MAX_BEAM:,}")
        if self.batch < 1 or self.limit < 0 or self.free_queries < 0:
            raise DataError(f"batch {self.batch}, limit {self.limit}, free queries {self.free_queries}: out of range")


@dataclass(frozen=True, eq=False)
class Task:
    """What every system answers: the judged queries of a split over the documents of a bundle.

    Attributes:
        documents: in the order of the bundle.
        ids: query ids, in an order drawn by a fixed seed.
        texts: query texts.
        histories: each query's earlier titles, oldest first.
        qrels: of these queries.
    """

    documents: list[Document]
    ids: list[str]
    texts: list[str]
    histories: list[tuple[str, ...]]
    qrels: Qrels

    def batches(self, size: int) -> Iterator[slice]:
        """Yield slices over the queries."""
        return (slice(start, start + size) for start in range(0, len(self.ids), size))


def make_task(dataset: Dataset, settings: Settings, bundle: Bundle) -> Task:
    """Choose the judged queries; refuse a bundle that lacks judged documents (with counts and examples)."""
    documents = bundle.documents.many(range(len(bundle.documents)))
    judged = dataset.judged(settings.split)
    order = np.random.default_rng(ORDER_SEED).permutation(len(judged))
    ids = [judged[row] for row in order[: settings.limit or len(judged)]]
    qrels = {query: dataset.qrels[settings.split][query] for query in ids}
    if not ids:
        raise DataError(f"{dataset.folder}: split {settings.split!r} has no query with a relevant document")
    asked = (document for grades in qrels.values() for document in grades)
    refuse_unknown(bundle.path, "judged document", asked, {document.id for document in documents})
    texts = [dataset.queries[query] for query in ids]
    return Task(documents, ids, texts, [dataset.histories.get(query, ()) for query in ids], qrels)


def seen_in_train(data: Path, task: Task) -> int:
    """Count the queries whose text stands in train too, with a document of theirs; white space and case are nothing.

    A train split that is not there, or that nobody can read, has seen none: it is not what is measured.
    """
    try:
        pairs = [(query, document) for query, document, grade in read_qrels(data / "qrels" / "train.tsv") if grade > 0]
        texts = {query.id: folded(query.text) for query in read_queries(data / "queries.jsonl")}
    except (DataError, OSError):
        return 0
    trained = {(texts[query], document) for query, document in pairs if query in texts}
    return sum(
        any((folded(text), document) in trained for document, grade in task.qrels[query].items() if grade > 0)
        for query, text in zip(task.ids, task.texts, strict=True)
    )


def first_queries(task: Task, count: int) -> Task:
    """The same task with the first so many queries only."""
    ids = task.ids[:count]
    return Task(
        task.documents, ids, task.texts[:count], task.histories[:count], {query: task.qrels[query] for query in ids}
    )


class EncodedQueries:
    """A task's queries as the encoder reads them, batch by batch; read often, encoded once as far as memory allows."""

    def __init__(self, encoder: Encoder, task: Task, batch: int) -> None:
        self._encoder, self._task, self._batch = encoder, task, batch
        self._kept: dict[int, tuple[Encoded, float]] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[Encoded, float]]:
        """Yield batches with the seconds that their encoding took, in order."""
        for rows in self._task.batches(self._batch):
            if rows.start in self._kept:
                yield self._kept[rows.start]
                continue
            started = time.perf_counter()
            encoded = self._encoder.encode_queries(self._task.texts[rows], self._task.histories[rows])
            entry = encoded, time.perf_counter() - started
            if self._bytes < KEPT_BYTES:
                self._kept[rows.start] = entry
                self._bytes += sum(array.nbytes for array in encoded.memory.values())
            yield entry

    def vectors(self) -> NDArray[np.float32]:
        """All pooled vectors (Q, D)."""
        parts = []
        with progress_bar("queries", len(self._task.ids)) as advance:
            for encoded, _ in self:
                parts.append(encoded.vectors_QD)
                advance(len(parts[-1]))
        return np.concatenate(parts)


def make_encoder(model: Model, threads: int) -> Encoder:
    """Open a model's encoder."""
    return Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, threads)


def untuned_vectors(folder: Path, task: Task, settings: Settings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Give query and document vectors of another encoder: of a model folder, or read from .npy files."""
    if (folder / "manifest.json").is_file():
        model = open_model(folder)
        pairs = [(document.title, document.text) for document in task.documents]
        encoder = make_encoder(model, settings.threads)
        return EncodedQueries(encoder, task, settings.batch).vectors(), encoder.encode_documents(pairs)
    queries = f"queries_{settings.split}"
    document_ids = [document.id for document in task.documents]
    return (
        read_vectors(folder / f"{queries}.npy", folder / f"{queries}.ids.txt", task.ids),
        read_vectors(folder / "docs.npy", folder / "docs.ids.txt", document_ids),
    )
