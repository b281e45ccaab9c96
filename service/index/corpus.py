"""Reading a corpus: JSON lines in the BEIR layout, streamed, with errors that name file, line and field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from service.index.documents import Document

MAX_LINE_BYTES = 1 << 26  # 64 MiB: longer lines are no documents, and one must fit in memory
MAX_NESTING = 100  # of metadata: writers of JSON stop at some two hundred
MAX_ID_CHARACTERS = 4096  # as long as a filter may name
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
KNOWN = ("_id", "title", "text", "metadata")


class CorpusError(Exception):
    """A corpus line cannot be used.

    Attributes:
        file: the file.
        line: line number from 1, None when the file as a whole is meant.
        field: the field, None when the line as a whole is meant.
        what: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, file: Path, line: int | None, field: str | None, what: str, remedy: str) -> None:
        self.file, self.line, self.field, self.what, self.remedy = file, line, field, what, remedy
        place = str(file) if line is None else f"{file}:{line}"
        super().__init__(f"{place}: {f'field {field!r} ' if field else ''}{what}: {remedy}")


def read_corpus(path: Path) -> Iterator[Document]:
    """Yield the documents of a BEIR corpus: lines of `{"_id", "title", "text", "metadata"}`.

    Unknown keys go to the metadata. Blank lines are skipped. Memory grows by the ids only, which are kept to find
    repeats.

    Args:
        path: the file, or a BEIR folder that holds `corpus.jsonl`.

    Raises:
        CorpusError: a line is not UTF-8, not a JSON object, lacks an id or text, repeats an id, holds a field of the
            wrong type, a lone surrogate, NaN or an infinity; or there are no documents at all.
    """
    file = path / "corpus.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise CorpusError(file, None, None, "does not exist", "give a JSON lines file or a folder with corpus.jsonl")
    first_lines: dict[str, int] = {}
    for number, raw in _lines(file):
        document = parse_document(file, number, raw)
        if document.id in first_lines:
            what = f"{shorten(document.id)} repeats the id of line {first_lines[document.id]}"
            raise CorpusError(file, number, "_id", what, "give every document its own id")
        first_lines[document.id] = number
        yield document
    if not first_lines:
        raise CorpusError(file, None, None, "holds no documents", "write one JSON object per line")


def parse_document(file: Path, line: int, raw: bytes) -> Document:
    """Return the document of one line; raises CorpusError (`file` and `line` go into its message)."""
    record = _parse_object(file, line, raw)
    for key, value in record.items():
        _check_encodable(file, line, key, value)
    text = {key: _string(file, line, key, record.get(key, "")) for key in ("_id", "title", "text")}
    _check_id(file, line, text["_id"])
    if not text["_id"].strip():
        what = "is empty" if "_id" in record else "is missing"
        raise CorpusError(file, line, "_id", what, "give every document an id")
    if not (text["title"].strip() or text["text"].strip()):
        raise CorpusError(
            file, line, "text", "is empty, and so is the title", "give the document text or remove the line"
        )
    return Document(text["_id"], text["title"], text["text"], _metadata(file, line, record))


def shorten(text: str, length: int = 80) -> str:
    """Return a quoted string for an error message, cut where it is long."""
    return repr(text if len(text) <= length else text[:length] + "…")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise CorpusError(file, number, None, f"is longer than {MAX_LINE_BYTES} bytes", "split the document")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # editors on Windows write this mark
            if raw.strip():
                yield number, raw


def _parse_object(file: Path, line: int, raw: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise CorpusError(file, line, None, f"holds {name}, which JSON does not have", "write null or a number")

    def parse_float(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse_constant(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            key = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise CorpusError(file, line, key, "occurs twice in one object", "keep one of them")
        return record

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        raise CorpusError(file, line, None, f"is not UTF-8 ({error.reason} at byte {error.start})", remedy) from None
    try:
        record = json.loads(text, parse_constant=refuse_constant, parse_float=parse_float, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorpusError(file, line, None, f"is not JSON ({error})", "write one JSON object per line") from None
    if not isinstance(record, dict):
        what = f"is a JSON {type(record).__name__}, not an object"
        raise CorpusError(file, line, None, what, 'write {"_id": …, "title": …, "text": …}')
    return record


def _string(file: Path, line: int, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CorpusError(file, line, key, f"is of type {type(value).__name__}, not a string", "write it in quotes")
    return value


def _check_encodable(file: Path, line: int, key: str, value: Any) -> None:
    try:
        json.dumps([key, value], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        remedy = r"write characters, not halves of \uD8xx\uDCxx pairs"
        raise CorpusError(file, line, ascii(key)[1:-1], "holds a lone surrogate", remedy) from None
    except RecursionError:
        raise CorpusError(file, line, key, "is nested too deeply", "flatten it") from None
    if (depth := _depth(value)) > MAX_NESTING:
        raise CorpusError(file, line, key, f"is nested {depth} deep, more than {MAX_NESTING}", "flatten it")


def _check_id(file: Path, line: int, given: str) -> None:
    """Refuse an id that no request could name."""
    if len(given) > MAX_ID_CHARACTERS:
        what = f"has {len(given)} characters, more than {MAX_ID_CHARACTERS}"
        raise CorpusError(file, line, "_id", what, "give the document a shorter id")
    if found := CONTROL_CHARACTERS.search(given):
        what = f"holds a control character at position {found.start()}"
        raise CorpusError(file, line, "_id", what, "write ids without line breaks and the like")


def _depth(value: Any) -> int:
    """Return how deep objects and lists are nested in a JSON value."""
    depth, here = 0, [value]
    while here := [value for value in here if isinstance(value, dict | list)]:
        depth += 1
        here = [inner for outer in here for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def _metadata(file: Path, line: int, record: dict[str, Any]) -> dict[str, Any]:
    given = record.get("metadata", {})
    if given is None:
        given = {}
    if not isinstance(given, dict):
        what = f"is of type {type(given).__name__}, not an object"
        raise CorpusError(file, line, "metadata", what, "write an object of names and values")
    loose = {key: value for key, value in record.items() if key not in KNOWN}
    if both := sorted(given.keys() & loose.keys()):
        raise CorpusError(file, line, both[0], "occurs beside metadata and within it", "keep one of them")
    return {**given, **loose}
