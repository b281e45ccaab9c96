"""Vectors to train an adapter on: a `.npy` file, a data folder that holds vectors, or a model that makes them.

    docs.npy, docs.ids.txt                   document vectors and their ids, one a line
    queries_train.npy, queries_train.ids.txt train queries, optional
    qrels/train.tsv                          which belong together, optional
    queries.jsonl, qrels/*.tsv               what the other splits ask for, optional

No vector of another split is read here, and train queries that ask what another split does are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from models.arrays import read_array
from models.data import load_dataset, read_qrels, read_queries, read_table, unlike
from models.lines import DataError, refuse_unknown
from models.qama.batches import IntArray
from service.index.bundle import open_model
from service.model.encoder import Encoder
from service.ops.progress import progress_bar

QUERIES = 64  # encoded at once
WANTED = "a .npy file of vectors (N, D), a folder with docs.npy, or a model"


class Vectors(NamedTuple):
    """What `train_adapter` takes; `queries` and `pairs` are None where there are no train queries."""

    documents: npt.NDArray[Any]
    queries: npt.NDArray[Any] | None
    pairs: IntArray | None


def read_vectors(data: Path, model: Path | None = None, *, quiet: bool = False) -> Vectors:
    """Read vectors, or make them.

    Args:
        data: a `.npy` file (N, D) of document vectors, or a folder as the module describes it.
        model: model artefact; its encoder makes all vectors of a folder from corpus.jsonl and queries.jsonl, because
            the folder's own may be another encoder's. A `.npy` file is taken to be this model's.
        quiet: no progress bars, and no word of train queries that are left out.

    Raises:
        DataError: a missing file, not one distinct id a row, unknown ids, or a file that is no array.
    """
    if data.suffix == ".npy":
        return Vectors(read_rows(data), None, None)
    if model is not None:
        return _encode(data, model, quiet)
    _check_file(data / "docs.npy")
    documents, ids = read_table(data / "docs.npy", data / "docs.ids.txt")
    if not (data / "queries_train.npy").is_file():
        return Vectors(documents, None, None)
    queries, query_ids = read_table(data / "queries_train.npy", data / "queries_train.ids.txt")
    kept = trainable(data, query_ids, quiet)
    if not kept:
        return Vectors(documents, None, None)
    return Vectors(documents, queries[kept], train_pairs(data, [query_ids[row] for row in kept], ids))


def read_all(sources: Sequence[Path], model: Path | None = None, *, quiet: bool = False) -> Vectors:
    """Read the vectors of several sources as of one; see `read_vectors`.

    Raises:
        DataError: as `read_vectors`, no source, or vectors of different widths.
    """
    parts = [read_vectors(source, model, quiet=quiet) for source in sources]
    widths = sorted({part.documents.shape[-1] for part in parts})
    if len(widths) != 1:
        raise DataError(f"{', '.join(map(str, sources)) or 'no data'}: vectors of one width are needed, found {widths}")
    documents = queries = 0
    pairs = []
    for part in parts:
        if part.pairs is not None:
            pairs.append(part.pairs + np.array([queries, documents]))
        documents, queries = (
            documents + len(part.documents),
            queries + len(() if part.queries is None else part.queries),
        )
    asked = [part.queries for part in parts if part.queries is not None]
    return Vectors(
        np.concatenate([part.documents for part in parts]),
        np.concatenate(asked) if asked else None,
        np.concatenate(pairs) if pairs else None,
    )


def train_pairs(data: Path, query_ids: list[str], document_ids: list[str]) -> IntArray | None:
    """Rows of train queries and documents that qrels/train.tsv holds relevant, (P, 2); None without that file.

    Raises:
        DataError: no pair at all names a known query and a known document.
    """
    path = data / "qrels" / "train.tsv"
    if not path.is_file():
        return None
    query_row = {id_: row for row, id_ in enumerate(query_ids)}
    document_row = {id_: row for row, id_ in enumerate(document_ids)}
    found = [
        (query_row[query], document_row[document])
        for query, document, grade in read_qrels(path)
        if grade > 0 and query in query_row and document in document_row
    ]
    if not found:
        raise DataError(f"{path}: no pair of a query in queries_train.ids.txt and a document in docs.ids.txt")
    return np.array(found, np.int64)


def trainable(data: Path, query_ids: Sequence[str], quiet: bool = False) -> list[int]:
    """Rows of the train queries whose text no other split of the folder asks for; says how many are left out.

    Without queries.jsonl, or without another qrels file, all rows.

    Raises:
        DataError: train queries that are not in queries.jsonl, or a bad line of a file.
    """
    path = data / "queries.jsonl"
    others = [split for split in sorted((data / "qrels").glob("*.tsv")) if split.stem != "train"]
    if not others or not path.is_file():
        return list(range(len(query_ids)))
    texts = {query.id: query.text for query in read_queries(path)}
    refuse_unknown(path, "query", query_ids, texts)
    held_out = {query for split in others for query, _, _ in read_qrels(split)}
    kept = unlike([texts[id_] for id_ in query_ids], [texts[id_] for id_ in held_out & texts.keys()])
    if len(kept) < len(query_ids) and not quiet:
        names = ", ".join(split.stem for split in others)
        left_out = f"{len(query_ids) - len(kept)} of {len(query_ids)} train queries ask what a query of {names} does"
        Console(stderr=True).print(f"{data}: {left_out}: left out", markup=False, soft_wrap=True)
    return kept


def read_rows(path: Path) -> npt.NDArray[Any]:
    """Read vectors (N, D) of a `.npy` file.

    Raises:
        DataError: missing, or no such array.
    """
    _check_file(path)
    array = read_array(path, WANTED)
    if array.ndim != 2:
        raise DataError(f"{path}: shape {array.shape}: give {WANTED}")
    return array


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; give {WANTED}")


def _encode(data: Path, model_dir: Path, quiet: bool) -> Vectors:
    model = open_model(model_dir)
    has_train = (data / "qrels" / "train.tsv").is_file()
    dataset = load_dataset(data, ["train"] if has_train else [])
    judged = dataset.judged("train") if has_train else []
    ids = [judged[row] for row in trainable(data, judged, quiet)]
    encoder = Encoder(model.path / "encoder.onnx", model.path / "tokenizer.json", model.manifest.text)
    with progress_bar("documents", len(dataset.documents), quiet) as advance:
        documents = encoder.encode_documents([(d.title, d.text) for d in dataset.documents], advance)
    if not ids:
        return Vectors(documents, None, None)
    queries = _encode_queries(encoder, [dataset.queries[id_] for id_ in ids], quiet)
    row = {id_: i for i, id_ in enumerate(ids)}
    pairs = [(row[query], position) for query, position in dataset.pairs("train") if query in row]
    return Vectors(documents, queries, np.array(pairs, np.int64))


def _encode_queries(encoder: Encoder, texts: list[str], quiet: bool) -> npt.NDArray[np.float32]:
    parts = []
    with progress_bar("queries", len(texts), quiet) as advance:
        for first in range(0, len(texts), QUERIES):
            some = texts[first : first + QUERIES]
            parts.append(encoder.encode_queries(some, memory=False).vectors_QD)
            advance(len(some))
    return np.concatenate(parts)
