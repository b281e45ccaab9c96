"""Reading text files line by line, with errors that name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # editors on Windows write it
EXAMPLES = 5  # ids shown in an error


class DataError(ValueError):
    """Data that cannot be used: the message names file, line and field, or counts with examples."""


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) of a JSON lines file; DataError for a line that is not UTF-8 or no JSON object."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: a {type(record).__name__}, must be a JSON object")
        yield number, record


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end), blank lines left out; DataError for what is not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from None
            if line.strip():
                yield number, line


def string_field(record: Mapping[str, Any], name: str, where: str) -> str:
    """Give a field that must be a non-empty string without lone surrogates; `where` (file:line) opens the error."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        what = "missing" if name not in record else "empty" if value == "" else f"{value!r:.40}"
        raise DataError(f"{where}: field '{name}' is {what}, must be a non-empty string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: field '{name}' holds a lone surrogate (\\ud800-\\udfff)")
    return value


def refuse_unknown(path: Path, what: str, ids: Iterable[str], known: Collection[str]) -> None:
    """Raise DataError with the count and examples of the ids that are not known; `path` and `what` name them."""
    unknown = list(dict.fromkeys(id_ for id_ in ids if id_ not in known))
    if unknown:
        examples = ", ".join(repr(id_) for id_ in unknown[:EXAMPLES])
        raise DataError(f"{path}: {len(unknown)} unknown {what} values, e.g. {examples} ({len(known)} are known)")
