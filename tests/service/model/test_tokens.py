"""Texts and token ids: prefixes, history, truncation at the right end, padding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from service.index.bundle import Model, open_model
from service.model import tokens
from service.model.session import ModelError
from service.model.text import TextSettings, document_text, query_text
from service.model.tokens import TextTokenizer, WordTokenizer, read_tokenizer

SETTINGS = TextSettings(
    max_query_tokens=16, max_document_tokens=16, query_prefix="query: ", history_separator=" | ", history_count=2
)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], "query: now"),
        (["a"], "query: a | now"),
        (["a", "b"], "query: a | b | now"),
        (["a", "b", "c", "d"], "query: c | d | now"),
    ],
)
def test_the_last_history_items_stand_before_the_query(history: list[str], expected: str) -> None:
    assert query_text("now", history, SETTINGS) == expected


def test_history_is_ignored_where_the_model_has_none() -> None:
    settings = SETTINGS.model_copy(update={"history_count": 0})
    assert query_text("now", ["a", "b"], settings) == "query: now"


def test_a_document_is_its_title_and_its_text() -> None:
    settings = SETTINGS.model_copy(update={"document_prefix": "passage: "})
    assert document_text("T", "x", settings) == "passage: T x"
    assert document_text("", "x", settings) == "passage: x"
    assert document_text("T", "", settings) == "passage: T"


def test_text_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="max_query_tokens"):
        TextSettings(max_query_tokens=3, max_document_tokens=16)
    with pytest.raises(ValidationError, match="extra"):
        TextSettings(max_query_tokens=8, max_document_tokens=16, extra=1)  # type: ignore[call-arg]


@pytest.fixture
def tokenizer(model: Model) -> TextTokenizer:
    return TextTokenizer(model.tokenizer_file, model.manifest.text)


def test_ids_are_those_of_the_tokenizers_library(model: Model, tokenizer: TextTokenizer) -> None:
    plain = Tokenizer.from_file(str(model.tokenizer_file))
    assert tokenizer.queries(["North star", "rhumb"]) == [plain.encode("North star").ids, plain.encode("rhumb").ids]
    assert tokenizer.documents([("sail", "mast"), ("", "keel")]) == [
        plain.encode("sail mast").ids,
        plain.encode("keel").ids,
    ]


def test_a_long_query_loses_its_end_and_keeps_the_special_tokens(model: Model, tokenizer: TextTokenizer) -> None:
    plain = Tokenizer.from_file(str(model.tokenizer_file))
    (ids,) = tokenizer.queries(["north " + "wind " * 50 + "south"])
    cls, sep = plain.token_to_id("[CLS]"), plain.token_to_id("[SEP]")
    assert len(ids) == 24
    assert (ids[0], ids[1], ids[-1]) == (cls, plain.token_to_id("north"), sep)


def test_a_long_history_loses_its_oldest_words_and_never_the_query(history_model_folder: Path) -> None:
    model = open_model(history_model_folder)
    tokenizer = TextTokenizer(model.tokenizer_file, model.manifest.text)
    plain = Tokenizer.from_file(str(model.tokenizer_file))
    (ids,) = tokenizer.queries(["star compass"], [["sail " * 40, "mast " * 40]])
    assert len(ids) == 24
    words = [plain.id_to_token(number) for number in ids]
    assert words[0] == "[CLS]"
    assert words[-3:] == ["star", "compass", "[SEP]"]
    assert "sail" not in words
    assert "mast" in words


def test_a_model_with_history_cuts_queries_alike_whether_they_have_one(history_model_folder: Path) -> None:
    model = open_model(history_model_folder)
    tokenizer = TextTokenizer(model.tokenizer_file, model.manifest.text)
    long = "north " + "wind " * 50 + "south"
    without = tokenizer.queries([long])
    assert without == tokenizer.queries([long], [[]])
    plain = Tokenizer.from_file(str(model.tokenizer_file))
    assert without[0][-2] == plain.token_to_id("south")


@pytest.mark.parametrize("text", ["", "north", "north " * 22, "north " * 23, "☃ a reef, " * 70, "[CLS] [SEP] " * 60])
def test_lengths_count_what_is_cut_off_too(text: str, model: Model, history_model_folder: Path) -> None:
    """Cut at the end, or, as queries of a model with history, at the beginning."""
    plain = Tokenizer.from_file(str(model.tokenizer_file))
    for opened, query, document in ((model, "", ""), (open_model(history_model_folder), "wind ", "calm ")):
        tokenizer = TextTokenizer(opened.tokenizer_file, opened.manifest.text)
        assert tokenizer.lengths(["south", text], "query")[1] == len(plain.encode(query + text).ids)
        assert tokenizer.lengths(["south", text], "document")[1] == len(plain.encode(document + text).ids)


def test_histories_must_be_one_for_each_query(history_model_folder: Path) -> None:
    model = open_model(history_model_folder)
    tokenizer = TextTokenizer(model.tokenizer_file, model.manifest.text)
    with pytest.raises(ValueError, match="1 histories for 2 queries"):
        tokenizer.queries(["north", "south"], [["east"]])


@given(sizes=st.lists(st.integers(0, 60), max_size=30))
def test_chunks_are_bounded_and_cover_every_text_once(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK_CHARACTERS", 50)
        found = [sizes[chunk] for chunk in tokens.chunks(sizes)]
    assert [size for chunk in found for size in chunk] == sizes
    assert all(sum(chunk) <= 50 or len(chunk) == 1 for chunk in found)
    assert all(sum(chunk) + after[0] > 50 for chunk, after in pairwise(found)), "no chunk is smaller than need be"


def test_texts_in_many_chunks_have_the_ids_of_each_alone(
    tokenizer: TextTokenizer, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["north " * number + "star" for number in range(30)]
    words = WordTokenizer(read_tokenizer(model.tokenizer_file))
    alone = [tokenizer.documents([("", text)])[0] for text in texts], [words.tokens([text])[0] for text in texts]
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 200)
    assert (tokenizer.documents([("", text) for text in texts]), words.tokens(texts)) == alone


@given(rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), max_size=5), multiple=st.integers(1, 8))
def test_padding_keeps_every_id_and_masks_the_rest(rows: list[list[int]], multiple: int) -> None:
    tokenizer = TextTokenizer.__new__(TextTokenizer)
    tokenizer.pad_id = 77
    ids, mask = tokenizer.pad(rows, multiple)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(rows), ids.shape[1])
    assert ids.shape[1] % multiple == 0
    assert ids.shape[1] - max(map(len, rows), default=0) < multiple
    for row, wanted in enumerate(rows):
        assert ids[row].tolist() == wanted + [77] * (ids.shape[1] - len(wanted))
        assert mask[row].tolist() == [1] * len(wanted) + [0] * (ids.shape[1] - len(wanted))


def test_a_lone_surrogate_is_named_and_not_repeated(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="query 1 holds a lone surrogate at character 2") as caught:
        tokenizer.queries(["fine", "ab\ud800cd"])
    str(caught.value).encode()


def test_odd_texts_still_have_ids(tokenizer: TextTokenizer) -> None:
    rows = tokenizer.queries(["", " ", "\x00\x01\x02", "😀", "x" * 100_000, "\u202e" * 30])
    assert all(2 <= len(row) <= 24 for row in rows)


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "9.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json' is not a tokenizer"):
        TextTokenizer(tmp_path / "tokenizer.json", SETTINGS)
