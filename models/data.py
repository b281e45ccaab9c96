"""Retrieval data in the BEIR layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv; TREC runs out.

    corpus.jsonl     {"_id": "d1", "title": "…", "text": "…"}        read by service.index.corpus
    queries.jsonl    {"_id": "q1", "text": "…", "history": ["…"]}    history optional: earlier titles, oldest first
    qrels/test.tsv   query-id <tab> corpus-id <tab> score            header optional; score > 0 is relevant
    sequences.jsonl  {"user": "u", "items": ["d1", "d2", …]}         optional: query "u-2" has the history d1, d2

Files are read line by line; every error names file, line and field.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.arrays import read_array
from models.lines import DataError, json_lines, lines, refuse_unknown, string_field
from models.runs import Run, write_run
from service.index.corpus import read_corpus
from service.index.documents import Document

SEQUENCES = "sequences.jsonl"
Qrels = dict[str, dict[str, int]]  # query id → document id → grade

__all__ = ["DataError", "Dataset", "Document", "Qrels", "Query", "Run", "load_dataset", "read_corpus", "write_run"]


class Query(NamedTuple):
    """A line of queries.jsonl; `history` is oldest first."""

    id: str
    text: str
    history: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A corpus with queries and relevance judgements.

    Attributes:
        folder: where it was read from.
        documents: in the order of corpus.jsonl.
        queries: query id → text, all splits.
        qrels: split → query id → document id → grade.
        histories: query id → titles of earlier items, oldest first; only queries that have one.
        position: document id → index in `documents`.
    """

    folder: Path
    documents: list[Document]
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    histories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)

    def judged(self, split: str) -> list[str]:
        """Give the ids of a split's queries that have a relevant document, in the order of the qrels file.

        Raises:
            DataError: no such split.
        """
        if split not in self.qrels:
            raise DataError(f"{self.folder}: no split {split!r}, there are: {', '.join(self.qrels) or 'none'}")
        return [query for query, grades in self.qrels[split].items() if max(grades.values()) > 0]

    def pairs(self, split: str) -> list[tuple[str, int]]:
        """Give every relevant (query id, document position) of a split."""
        judged = self.judged(split)
        grades = self.qrels[split]
        return [(query, self.position[d]) for query in judged for d, grade in grades[query].items() if grade > 0]

    def followed(self, split: str) -> set[str]:
        """Give the queries `<user>-<n>` of a split that a later query of the same user follows; none without sequences.

        What they ask for is in the history of the later ones: a retriever that was trained on those has seen it.
        """
        if not (self.folder / SEQUENCES).is_file():
            return set()
        steps: dict[str, list[tuple[int, str]]] = {}
        for query in self.qrels[split]:
            if step := user_step(query):
                steps.setdefault(step[0], []).append((step[1], query))
        return {query for taken in steps.values() for _, query in sorted(taken)[:-1]}

    def popularity(self, split: str = "train") -> NDArray[np.int64]:
        """Count the relevant queries of every document in a split: (documents,) int64."""
        counts = Counter(position for _, position in self.pairs(split))
        return np.array([counts[i] for i in range(len(self.documents))], dtype=np.int64)


def load_dataset(folder: Path | str, splits: Sequence[str] | None = None, history: int = 0) -> Dataset:
    """Read a folder in the BEIR layout.

    Args:
        folder: holds corpus.jsonl, queries.jsonl and qrels/*.tsv.
        splits: names of qrels files to read; all of them when None; with none a bare corpus will do.
        history: keep at most so many of the latest earlier items of a query; 0 keeps none.

    Raises:
        DataError: a missing file, a bad line, or qrels that name unknown ids.
        service.index.corpus.CorpusError: a bad line of the corpus.
    """
    folder = Path(folder)
    paths = _qrels_paths(folder, splits)
    bare = not paths and not (folder / "queries.jsonl").exists()
    for path in (folder / "corpus.jsonl", *(() if bare else (folder / "queries.jsonl", *paths.values()))):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a data set needs corpus.jsonl, queries.jsonl and qrels/<split>.tsv")
    documents = list(read_corpus(folder / "corpus.jsonl"))
    queries = {} if bare else {query.id: query for query in read_queries(folder / "queries.jsonl")}
    position = {document.id: i for i, document in enumerate(documents)}
    qrels = {split: _checked_qrels(path, queries, position) for split, path in paths.items()}
    titles = {document.id: document.title or document.text for document in documents}
    histories = read_histories(folder, queries, titles, history) if history > 0 else {}
    texts = {query.id: query.text for query in queries.values()}
    return Dataset(folder, documents, texts, qrels, histories, position)


def read_queries(path: Path | str) -> Iterator[Query]:
    """Yield the lines of a queries.jsonl.

    Raises:
        DataError: not UTF-8, not a JSON object, missing, empty, non-string or repeated id or text, bad history.
    """
    path = Path(path)
    seen: set[str] = set()
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        id_, text = string_field(record, "_id", where), string_field(record, "text", where)
        if id_ in seen:
            raise DataError(f"{where}: field '_id' repeats {id_!r}")
        seen.add(id_)
        history = record.get("history", [])
        if not isinstance(history, list) or not all(isinstance(item, str) for item in history):
            raise DataError(f"{where}: field 'history' must be a list of strings")
        yield Query(id_, text, tuple(history))


def read_qrels(path: Path | str) -> Iterator[tuple[str, str, int]]:
    """Yield (query id, document id, grade) of a qrels file; a header line is skipped.

    Raises:
        DataError: not UTF-8, not three tab-separated fields, a grade that is no whole number, a pair judged twice.
    """
    path = Path(path)
    seen: set[tuple[str, str]] = set()
    for number, line in lines(path):
        fields = line.split("\t")
        if number == 1 and len(fields) == 3 and not re.fullmatch(r"-?\d+", fields[2]):
            continue  # the header
        if len(fields) != 3:
            raise DataError(f"{path}:{number}: {len(fields)} tab-separated fields, need query-id, corpus-id and score")
        query, document, grade = fields
        for name, value in (("query-id", query), ("corpus-id", document)):
            if not value.strip():
                raise DataError(f"{path}:{number}: field '{name}' is empty")
        if not re.fullmatch(r"-?\d{1,9}", grade):
            raise DataError(f"{path}:{number}: field 'score' is {grade!r}, must be a whole number")
        if (query, document) in seen:
            raise DataError(f"{path}:{number}: query {query!r} and document {document!r} are judged twice")
        seen.add((query, document))
        yield query, document, int(grade)


def read_histories(
    folder: Path, queries: Mapping[str, Query], titles: Mapping[str, str], last: int
) -> dict[str, tuple[str, ...]]:
    """Give the titles of at most `last` earlier items of every query that has any, oldest first.

    Items come from the query's own `history`, or from sequences.jsonl, where the query `<user>-<n>` follows the
    user's first n items. An item that is a document id is shown by its title.

    Raises:
        DataError: a bad line of sequences.jsonl, or items that are no documents (with counts and examples).
    """
    histories = {query.id: tuple(titles.get(item, item) for item in query.history) for query in queries.values()}
    path = folder / SEQUENCES
    if path.is_file():
        sequences = dict(_read_sequences(path))
        refuse_unknown(path, "item", (i for items in sequences.values() for i in items), titles)
        for query in queries:
            step = user_step(query)
            if step and step[0] in sequences and not histories[query]:
                histories[query] = tuple(titles[item] for item in sequences[step[0]][: step[1]])
    return {query: items[-last:] for query, items in histories.items() if items}


def user_step(query: str) -> tuple[str, int] | None:
    """Give user and number of a query `<user>-<n>`; None for another id."""
    user, dash, count = query.rpartition("-")
    return (user, int(count)) if dash and count.isdecimal() else None


def read_interactions(path: Path | str, documents: Mapping[str, Any]) -> dict[str, int]:
    """Read `corpus-id <tab> count` lines: document id → interactions.

    Raises:
        DataError: not two fields, a count that is no whole number ≥ 0, an id twice, or unknown documents (with counts).
    """
    path, counts = Path(path), {}
    for number, line in lines(path):
        fields = line.split("\t")
        if number == 1 and len(fields) == 2 and not re.fullmatch(r"-?\d+", fields[1]):
            continue  # the header
        if len(fields) != 2 or not re.fullmatch(r"\d{1,15}", fields[1]):
            raise DataError(f"{path}:{number}: need corpus-id <tab> count, a whole number of at least 0")
        if fields[0] in counts:
            raise DataError(f"{path}:{number}: field 'corpus-id' repeats {fields[0]!r}")
        counts[fields[0]] = int(fields[1])
    refuse_unknown(path, "document", counts, documents)
    return counts


def read_vectors(vectors: Path, ids: Path, wanted: Sequence[str]) -> NDArray[np.float32]:
    """Read rows of a .npy file (N, D), whose ids stand one a line in `ids`, in the order wanted, as float32.

    Raises:
        DataError: as `read_table`, or wanted ids without a row (with counts and examples).
    """
    table, names = read_table(vectors, ids)
    rows = {id_: row for row, id_ in enumerate(names)}
    refuse_unknown(ids, "id", wanted, rows)
    return np.asarray(table[[rows[id_] for id_ in wanted]], dtype=np.float32)


def read_table(vectors: Path, ids: Path) -> tuple[NDArray[Any], list[str]]:
    """Read a .npy file (N, D) by memory map, and the ids of its rows, which stand one a line in `ids`.

    Raises:
        DataError: a missing file, or not as many distinct ids as rows (with the numbers).
    """
    for path in (vectors, ids):
        if not path.is_file():
            raise DataError(f"{path}: no such file; vectors need NAME.npy and NAME.ids.txt beside it")
    table = read_array(vectors, "vectors (N, D)", mapped=True)
    names = [id_ for _, id_ in lines(ids)]
    distinct = len(set(names))
    if table.ndim != 2 or not len(table) == len(names) == distinct:
        raise DataError(
            f"{vectors}: shape {table.shape}, but {ids} names {distinct} distinct rows in {len(names)} lines: "
            "give every row an id of its own, one a line"
        )
    return table, names


def _qrels_paths(folder: Path, splits: Sequence[str] | None) -> dict[str, Path]:
    if splits is None:
        paths = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
        if not paths:
            raise DataError(f"{folder / 'qrels'}: no .tsv file; a data set needs qrels/<split>.tsv")
        return paths
    return {split: folder / "qrels" / f"{split}.tsv" for split in splits}


def _checked_qrels(path: Path, queries: Mapping[str, Any], documents: Mapping[str, Any]) -> Qrels:
    qrels: Qrels = {}
    for query, document, grade in read_qrels(path):
        qrels.setdefault(query, {})[document] = grade
    refuse_unknown(path, "query-id", qrels, queries)
    refuse_unknown(path, "corpus-id", (d for grades in qrels.values() for d in grades), documents)
    if not qrels:
        raise DataError(f"{path}: no judgements")
    return qrels


def unlike(texts: Sequence[str], others: Iterable[str]) -> list[int]:
    """Rows of the texts that are `folded` none of the others."""
    asked = {folded(text) for text in others}
    return [row for row, text in enumerate(texts) if folded(text) not in asked]


def vectors_file(run: Path, folder: Path) -> Path:
    """Where a training keeps the vectors of a data set's documents, in the order of its corpus."""
    return run / "vectors" / f"{folder.resolve().name}.npy"


def folded(text: str) -> str:
    """A text whose case and white space count for nothing."""
    return " ".join(text.split()).casefold()


def _read_sequences(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, record in json_lines(path):
        items = record.get("items")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise DataError(f"{path}:{number}: field 'items' must be a list of strings")
        yield string_field(record, "user", f"{path}:{number}"), items
