"""Reading a corpus: good lines become documents, bad ones are named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.corpus import MAX_LINE_BYTES, CorpusError, read_corpus
from service.index.documents import Document

GOOD = b'{"_id": "a", "title": "t", "text": "x"}'


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_beir_fields_and_unknown_keys(tmp_path: Path) -> None:
    lines = (
        b'{"_id": "a", "title": "T", "text": "x", "metadata": {"url": "u"}}',
        b"",
        '{"_id": "b", "text": "y \\ud83d\\ude00 ü", "stars": 3.5, "tags": ["p", null]}'.encode(),
        b'{"_id": "c", "title": "only a title", "metadata": null}\r',
    )
    assert list(read_corpus(write(tmp_path / "corpus.jsonl", *lines))) == [
        Document("a", "T", "x", {"url": "u"}),
        Document("b", "", "y 😀 ü", {"stars": 3.5, "tags": ["p", None]}),
        Document("c", "only a title", "", {}),
    ]


def test_a_folder_stands_for_its_corpus_file_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", b"\xef\xbb\xbf" + GOOD)
    assert [document.id for document in read_corpus(tmp_path)] == ["a"]


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    assert len(list(read_corpus(tmp_path / "c.jsonl"))) == 1


@pytest.mark.parametrize(
    ("line", "field", "what"),
    [
        (b"{", None, "is not JSON"),
        (b"nonsense", None, "is not JSON"),
        (b"[" * 100_000, None, "is not JSON"),
        (b'"text"', None, "is a JSON str, not an object"),
        (b"[1]", None, "is a JSON list, not an object"),
        (b"null", None, "is a JSON NoneType, not an object"),
        (b'{"text": "x"}', "_id", "is missing"),
        (b'{"_id": "", "text": "x"}', "_id", "is empty"),
        (b'{"_id": "  ", "text": "x"}', "_id", "is empty"),
        (b'{"_id": 7, "text": "x"}', "_id", "is of type int, not a string"),
        (b'{"_id": null, "text": "x"}', "_id", "is of type NoneType"),
        (b'{"_id": "b", "title": ["x"]}', "title", "is of type list"),
        (b'{"_id": "b", "text": {"a": 1}}', "text", "is of type dict"),
        (b'{"_id": "b"}', "text", "is empty, and so is the title"),
        (b'{"_id": "b", "title": " ", "text": "\\n"}', "text", "is empty, and so is the title"),
        (b'{"_id": "a", "text": "x"}', "_id", "'a' repeats the id of line 1"),
        (b'{"_id": "b", "text": "\xff"}', None, "is not UTF-8"),
        (b'{"_id": "b", "text": "\xed\xa0\x80"}', None, "is not UTF-8"),
        (b'{"_id": "b", "text": "\\ud800"}', "text", "holds a lone surrogate"),
        (b'{"_id": "\\udc00", "text": "x"}', "_id", "holds a lone surrogate"),
        (b'{"_id": "b", "text": "x", "metadata": {"k": ["\\ud800"]}}', "metadata", "holds a lone surrogate"),
        (b'{"_id": "b", "text": "x", "\\ud800": 1}', r"\ud800", "holds a lone surrogate"),
        (b'{"_id": "b", "text": "x", "metadata": {"score": NaN}}', None, "holds NaN"),
        (b'{"_id": "b", "text": "x", "score": -Infinity}', None, "holds -Infinity"),
        (b'{"_id": "b", "text": "x", "score": 1e999}', None, "holds 1e999"),
        (b'{"_id": "b", "text": "x", "metadata": 3}', "metadata", "is of type int, not an object"),
        (b'{"_id": "b", "text": "x", "k": 1, "metadata": {"k": 2}}', "k", "occurs beside metadata"),
        (b'{"_id": "b", "text": "x", "text": "y"}', "text", "occurs twice"),
        (b'{"_id": "b\\nc", "text": "x"}', "_id", "holds a control character at position 1"),
        (b'{"_id": "' + b"b" * 4097 + b'", "text": "x"}', "_id", "has 4097 characters, more than 4096"),
        (b'{"_id": "b", "text": "x", "m": ' + b"[" * 101 + b"]" * 101 + b"}", "m", "is nested 101 deep"),
        (b'{"_id": "b", "text": "x", "n": ' + b"1" * 5000 + b"}", None, "is not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: bytes, field: str | None, what: str) -> None:
    path = write(tmp_path / "corpus.jsonl", GOOD, b"", line, b'{"_id": "z", "text": "never reached"}')
    with pytest.raises(CorpusError) as caught:
        list(read_corpus(path))
    error = caught.value
    assert (error.file, error.line, error.field) == (path, 3, field)
    assert what in error.what
    assert error.remedy
    assert str(error).startswith(f"{path}:3: ")
    assert len(str(error)) < 1000 + len(str(path))


def test_a_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no documents"):
        list(read_corpus(write(tmp_path / "corpus.jsonl", b"", b"  ")))


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.jsonl: does not exist: give"):
        list(read_corpus(tmp_path))


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        file.truncate(3 * MAX_LINE_BYTES)  # a sparse file: no line end anywhere
    with pytest.raises(CorpusError, match=f"is longer than {MAX_LINE_BYTES} bytes"):
        list(read_corpus(path))


def test_documents_before_a_bad_line_are_streamed(tmp_path: Path) -> None:
    stream = read_corpus(write(tmp_path / "corpus.jsonl", GOOD, b"bad"))
    assert next(stream).id == "a"
    with pytest.raises(CorpusError, match=":2: is not JSON"):
        next(stream)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
RECORDS = st.dictionaries(st.sampled_from(["_id", "title", "text", "metadata", "x"]), JSON | st.text(min_size=1))


@settings(max_examples=200)
@given(lines=st.lists(st.binary(max_size=60) | RECORDS.map(lambda record: json.dumps(record).encode()), max_size=4))
def test_whatever_a_file_holds_it_is_documents_or_a_corpus_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", *lines)
    try:
        documents = list(read_corpus(path))
    except CorpusError as error:
        str(error).encode()  # a message that can be printed
    else:
        assert documents
        for document in documents:
            assert document.id.strip()
            assert (document.title + document.text).strip()
            (document.id + document.title + document.text + json.dumps(document.metadata, allow_nan=False)).encode()


@pytest.mark.data
@pytest.mark.parametrize("name", ["tldr", "scifact"])
def test_real_corpora_are_read_in_order(datasets: Path, name: str) -> None:
    lines = (datasets / name / "corpus.jsonl").read_text("utf-8").splitlines()
    expected = [json.loads(line) for line in lines]
    documents = list(read_corpus(datasets / name))
    assert [document.id for document in documents] == [record["_id"] for record in expected]
    assert [document.text for document in documents] == [record["text"] for record in expected]
