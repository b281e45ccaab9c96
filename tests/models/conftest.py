"""A tiny Hugging Face encoder and a tiny data set, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from models.study.quick import write_bert
from tests.tiny import WORDS, make_documents, write_tokenizer


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of width 24 with the tests' word tokenizer, as a local Hugging Face folder."""
    folder = tmp_path_factory.mktemp("encoder")
    write_bert(folder, vocabulary=400, width=24)
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, two train queries and one test query each: three words of the document in random order."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(5)
    documents = make_documents(60, seed=1)
    corpus = [{"_id": d.id, "title": d.title, "text": d.text} for d in documents]
    queries, qrels = [], {"train": [], "test": []}
    for document in documents:
        words = [word for word in document.text.replace(".", " ").split() if word in WORDS]
        for number, split in enumerate(("train", "train", "test")):
            queries.append({"_id": f"{document.id}-{number}", "text": " ".join(rng.sample(words, min(3, len(words))))})
            qrels[split].append(f"{document.id}-{number}\t{document.id}\t1")
    write_lines(folder / "corpus.jsonl", [json.dumps(row) for row in corpus])
    write_lines(folder / "queries.jsonl", [json.dumps(row) for row in queries])
    (folder / "qrels").mkdir()
    for split, rows in qrels.items():
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    return folder


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
