"""A file of pseudo-queries, as editors write them and as they go wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.lines import DataError
from models.retriever.pseudo_queries import read_pseudo_queries

LINE = b'{"_id": "a", "text": "how to sail"}\n'


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n\n" + LINE.replace(b'"a"', b'"b"'))
    assert read_pseudo_queries(path, {"a": 7, "b": 2}) == [("how to sail", 7), ("how to sail", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"_id": "a", "text": "\xff"}', ":2: not UTF-8 at byte 22 of the line"),
        (b"how to sail", ":2: not JSON ("),
        (b'["a", "how to sail"]', ":2: a list, must be a JSON object"),
        (b'{"_id": "a"}', ":2: field 'text' is missing, must be a non-empty string"),
        (b'{"_id": 3, "text": "x"}', ":2: field '_id' is 3, must be a non-empty string"),
        (b'{"_id": "b", "text": "x"}', ": 1 unknown _id values, e.g. 'b' (1 are known)"),
    ],
)
def test_a_line_that_is_none_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_bytes(LINE + line)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        read_pseudo_queries(path, {"a": 0})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_pseudo_queries(tmp_path / "none.jsonl", {})
