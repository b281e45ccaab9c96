"""The inverted index against BM25 as it is written down."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.index.build import build_bundle
from service.index.bundle import open_bundle
from service.index.inspect import inspect_artefact
from service.index.postings import build_postings
from service.model.tokens import WordTokenizer, read_tokenizer
from tests.tiny import make_documents

VOCABULARY = 7
Rows = list[list[int]]


def bm25(rows: Rows, token: int, document: int, k1: float = 1.2, b: float = 0.75) -> float:
    """Robertson and Zaragoza 2009, section 3.5, with an idf that is never below 0."""
    holding = sum(token in row for row in rows)
    mean = sum(map(len, rows)) / len(rows)
    tf = rows[document].count(token)
    idf = math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))
    return idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(rows[document]) / mean))


@given(
    rows=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=9), min_size=1, max_size=8),
    block=st.integers(1, 4),
)
def test_every_pair_of_token_and_document_is_there_once_with_its_bm25(rows: Rows, block: int) -> None:
    postings = build_postings((rows[start : start + block] for start in range(0, len(rows), block)), VOCABULARY)
    assert postings.vocabulary == VOCABULARY
    assert postings.start_V[-1] == len(postings.document_P) == len(postings.worth_P)
    for token in range(VOCABULARY):
        here = slice(postings.start_V[token], postings.start_V[token + 1])
        holding = [document for document, row in enumerate(rows) if token in row]
        assert postings.document_P[here].tolist() == holding
        assert postings.worth_P[here] == pytest.approx([bm25(rows, token, document) for document in holding], rel=1e-6)


def test_no_documents_are_no_postings() -> None:
    postings = build_postings([], 3)
    assert (postings.start_V.tolist(), len(postings.document_P)) == ([0, 0, 0, 0], 0)


def test_a_bundle_holds_the_words_of_whole_titles_and_texts(tiny_bundle: Path) -> None:
    """Beyond what the encoder reads, without special tokens and without what the tokenizer does not know."""
    with closing(open_bundle(tiny_bundle)) as bundle:
        assert bundle.postings is not None
        tokenizer = WordTokenizer(read_tokenizer(bundle.model.tokenizer_file))
        documents = bundle.documents.many(range(len(bundle.documents)))
        rows = tokenizer.tokens([f"{document.title} {document.text}" for document in documents])
        expected = build_postings([rows], tokenizer.vocabulary)
        for found, wanted in zip(vars(bundle.postings).values(), vars(expected).values(), strict=True):
            assert isinstance(found, np.memmap)
            assert np.array_equal(found, wanted)
        special = {tokenizer.tokens([name])[0][0] for name in ("[CLS]", "[SEP]")}
        assert not special & {2, 3}, "what a text spells like a special token is text"
        assert tokenizer.tokens(["north ☃ north", "", "☃"]) == [rows_of(tokenizer, "north") * 2, [], []]
        long = " ".join(["keel"] * 500)
        assert len(tokenizer.tokens([long])[0]) == 500


def rows_of(tokenizer: WordTokenizer, text: str) -> list[int]:
    (row,) = tokenizer.tokens([text])
    return row


def test_a_bundle_may_do_without(tiny_model: Path, tmp_path: Path) -> None:
    manifest = build_bundle(tiny_model, make_documents(), tmp_path / "bundle", progress=False, lexical=False)
    assert manifest.lexical is None
    assert not [name for name in manifest.files if "postings" in name]
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        assert bundle.postings is None
        bundle.touch()


def test_inspect_says_what_words_take(tiny_bundle: Path) -> None:
    inspection = inspect_artefact(tiny_bundle)
    assert inspection.index is not None
    assert inspection.index.bytes_per_document["postings_worth.npy"] > 4
    assert inspection.as_json()["manifest"]["lexical"]["postings"] > 60
