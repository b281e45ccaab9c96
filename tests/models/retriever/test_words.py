"""The weight of words beside the cosine, chosen by held-out queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.data import load_dataset
from models.retriever.material import gather
from models.retriever.recipe import parse_recipe
from models.retriever.words import WEIGHTS, choose_lexical_weight
from service.model.tokens import WordTokenizer, read_tokenizer
from tests.tiny import write_tokenizer

DOCUMENTS = ["the keel", "the mast", "the reef", "the rope"]  # "the" stands in all
WANTED = [0, 1, 2, 3]


@pytest.fixture
def tokenizer(tmp_path: Path) -> WordTokenizer:
    write_tokenizer(tmp_path / "tokenizer.json")
    return WordTokenizer(read_tokenizer(tmp_path / "tokenizer.json"))


def vectors(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((4, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_where_words_say_all_they_are_turned_up(tokenizer: WordTokenizer) -> None:
    weight, gained, before = choose_lexical_weight(tokenizer, DOCUMENTS, DOCUMENTS, WANTED, vectors(0), vectors(1))
    assert weight >= 0.3
    assert gained == 1.0 > before


def test_where_words_mislead_they_are_turned_down(tokenizer: WordTokenizer) -> None:
    """Every query holds the word of a document that it does not ask for, and its vector is right."""
    misled, exact = [*DOCUMENTS[1:], DOCUMENTS[0]], vectors(2)
    weight, gained, before = choose_lexical_weight(tokenizer, DOCUMENTS, misled, WANTED, exact, exact)
    assert weight == WEIGHTS[0]
    assert gained == before == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_gain_is_that_of_the_weight(tokenizer: WordTokenizer, seed: int) -> None:
    """By hand: ranks under cosine + weight · share; the second query's word stands nowhere."""
    queries = ["the keel", "the bell", "the rope", "the keel"]
    vectors_QD, vectors_ND = vectors(seed), vectors(seed + 10)
    weight, gained, before = choose_lexical_weight(tokenizer, DOCUMENTS, queries, WANTED, vectors_QD, vectors_ND)
    letters = len(tokenizer.tokens(["the"])[0])  # a word that the vocabulary lacks is some of its pieces

    def mrr(weight: float) -> float:
        total = 0.0
        for row, wanted in enumerate(WANTED):
            hits = np.array([document == queries[row] for document in DOCUMENTS])
            common, rare = letters * np.log1p(0.5 / 4.5), np.log1p(3.5 / 1.5)  # idf in all four documents, in one
            share = (common + hits * rare) / (common + hits.any() * rare) / 2.2  # each once: tf (k1 + 1) / (tf + k1)
            scores = vectors_ND @ vectors_QD[row] + weight * share
            total += 1 / (1 + (scores > scores[wanted]).sum())
        return total / len(WANTED)

    assert gained == pytest.approx(max(mrr(weight) for weight in WEIGHTS)) == pytest.approx(mrr(weight))
    assert before == pytest.approx(mrr(0.0))


def test_words_are_what_was_asked_without_prefix_and_history(tiny_data: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    table = {
        "name": "words",
        "text": {
            "max_query_tokens": 12,
            "max_document_tokens": 8,
            "query_prefix": "find: ",
            "document_prefix": "text: ",
        },
        "dev_share": 0.3,
        "stage": [{"name": "real", "objective": "contrast", "queries": "real", "epochs": 1, "encoder_lr": 1e-4}],
        "decoder": {"layers": 0},
        "default_scoring": "geometric",
    }
    dataset = load_dataset(tiny_data, ["train"])
    material = gather([dataset], parse_recipe(table), read_tokenizer(tmp_path / "tokenizer.json"))
    assert material.document_words == [f"{document.title} {document.text}" for document in dataset.documents]
    asked = {(dataset.queries[query], document) for query, document in dataset.pairs("train")}
    held = [(text, document) for text, (_, document) in zip(material.held_out_words, material.held_out, strict=True)]
    assert held
    assert set(held) <= asked
