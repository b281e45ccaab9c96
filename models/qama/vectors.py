"""Vectors to train an adapter on: a `.npy` file, a data folder that holds vectors, or a model that makes them.

    docs.npy, docs.ids.txt                   document vectors and their ids, one a line
    queries_train.npy, queries_train.ids.txt train queries, optional
    qrels/train.tsv                          which belong together, optional

Test queries are never read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.arrays import read_array
from models.data import load_dataset, read_qrels
from models.lines import DataError, lines
from models.qama.batches import IntArray
from service.index.bundle import open_model
from service.model.encoder import Encoder
from service.ops.progress import progress_bar

QUERIES = 64  # encoded at once


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
        quiet: no progress bars.

    Raises:
        DataError: a missing file, unknown ids, or a file that is no array.
    """
    if data.suffix == ".npy":
        return Vectors(read_rows(data), None, None)
    if model is not None:
        return _encode(data, model, quiet)
    documents, ids = read_rows(data / "docs.npy"), read_ids(data / "docs.ids.txt")
    train = data / "queries_train.npy"
    if not train.is_file():
        return Vectors(documents, None, None)
    queries, query_ids = read_rows(train), read_ids(data / "queries_train.ids.txt")
    return Vectors(documents, queries, train_pairs(data, query_ids, ids))


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


def read_rows(path: Path) -> npt.NDArray[Any]:
    """Read vectors (N, D) of a `.npy` file.

    Raises:
        DataError: missing, or no such array.
    """
    wanted = "a .npy file of vectors (N, D), a folder with docs.npy, or a model"
    if not path.is_file():
        raise DataError(f"{path}: no such file; give {wanted}")
    array = read_array(path, wanted)
    if array.ndim != 2:
        raise DataError(f"{path}: shape {array.shape}: give {wanted}")
    return array


def read_ids(path: Path) -> list[str]:
    """Read ids, one a line.

    Raises:
        DataError: missing or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; vectors need NAME.npy and NAME.ids.txt beside it")
    return [line for _, line in lines(path)]


def _encode(data: Path, model_dir: Path, quiet: bool) -> Vectors:
    model = open_model(model_dir)
    has_train = (data / "qrels" / "train.tsv").is_file()
    dataset = load_dataset(data, ["train"] if has_train else [])
    encoder = Encoder(model.path / "encoder.onnx", model.path / "tokenizer.json", model.manifest.text)
    with progress_bar("documents", len(dataset.documents), quiet) as advance:
        documents = encoder.encode_documents([(d.title, d.text) for d in dataset.documents], advance)
    if not has_train:
        return Vectors(documents, None, None)
    ids = dataset.judged("train")
    parts = []
    with progress_bar("queries", len(ids), quiet) as advance:
        for first in range(0, len(ids), QUERIES):
            texts = [dataset.queries[id_] for id_ in ids[first : first + QUERIES]]
            parts.append(encoder.encode_queries(texts, memory=False).vectors_QD)
            advance(len(texts))
    row = {id_: i for i, id_ in enumerate(ids)}
    pairs = np.array([(row[query], position) for query, position in dataset.pairs("train")], np.int64)
    return Vectors(documents, np.concatenate(parts), pairs)
