"""The document store of a bundle: SQLite, opened read-only and immutable; readers borrow connections."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Any
from urllib.parse import quote

SCHEMA = """
CREATE TABLE documents(
    position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL
)
"""
COLUMNS = "id, title, text, metadata"
NAMES = "id, title, '', '{}'"  # of a document whose text and metadata are not read
PARAMETERS = 500  # of one statement; SQLite's oldest limit is 999
READERS = 16  # connections; a reader has one for less than a millisecond at a time


@dataclass(frozen=True)
class Document:
    """What is found: an id, a title, a text (title or text is not empty) and free metadata."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class DocumentStore:
    """Documents by position or id; safe to use from many threads. Close it when no thread reads any more.

    All connections are opened here: the path may lead to another bundle, or to none, by the time that they are needed.
    """

    def __init__(self, path: Path) -> None:
        self._idle: LifoQueue[sqlite3.Connection] = LifoQueue()
        self._is_closed = False
        for _ in range(READERS):
            self._idle.put(_connect(path))
        with self._connection() as connection:
            count, last = connection.execute("SELECT COUNT(*), MAX(position) FROM documents").fetchone()
        if last is not None and last + 1 != count:
            raise ValueError(f"'{path}' holds {count} documents with positions up to {last}: build the bundle again")
        self._count = int(count)

    def __len__(self) -> int:
        return self._count

    def get(self, position: int) -> Document:
        """Return the document at a position; raises IndexError outside 0 .. len - 1."""
        return self.many([position])[0]

    def by_id(self, document_id: str) -> int | None:
        """Return the position of a document, or None for an unknown id."""
        try:
            with self._connection() as connection:
                row = connection.execute("SELECT position FROM documents WHERE id = ?", (document_id,)).fetchone()
        except UnicodeEncodeError:  # lone surrogates: no stored id has any
            return None
        return None if row is None else int(row[0])

    def positions_of(self, ids: Sequence[str]) -> list[int | None]:
        """Return the position of each document, None for unknown ids, in a few statements however many there are."""
        found: dict[str, int] = {}
        known = [each for each in dict.fromkeys(ids) if _is_storable(each)]
        for start in range(0, len(known), PARAMETERS):
            chunk = known[start : start + PARAMETERS]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT id, position FROM documents WHERE id IN ({marks})"  # noqa: S608 - only marks
            with self._connection() as connection:
                found.update(connection.execute(query, chunk))
        return [found.get(each) for each in ids]

    def many(self, positions: Sequence[int], whole: bool = True) -> list[Document]:
        """Return the documents at some positions, in that order, repeats included; raises IndexError as `get`.

        Without `whole` they have their ids and titles alone: long texts are not read.
        """
        wanted = [int(position) for position in positions]
        found = dict(self._rows(sorted(set(wanted)), COLUMNS if whole else NAMES))
        for position in wanted:
            if position not in found:
                raise IndexError(f"no document at position {position}: the bundle holds {self._count}")
        return [found[position] for position in wanted]

    def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        while not self._idle.empty():
            self._idle.get().close()

    def _rows(self, positions: list[int], columns: str) -> Iterator[tuple[int, Document]]:
        for start in range(0, len(positions), PARAMETERS):
            chunk = positions[start : start + PARAMETERS]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT position, {columns} FROM documents WHERE position IN ({marks})"  # noqa: S608 - no input
            with self._connection() as connection:
                rows = connection.execute(query, chunk).fetchall()
            for position, *values in rows:
                yield position, document_of(values)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend an idle connection; wait for one where all are lent. Nobody borrows a second one meanwhile."""
        if self._is_closed:
            raise sqlite3.ProgrammingError("the document store is closed")
        connection = self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put(connection)


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    connection.execute("PRAGMA mmap_size = 268435456")
    return connection


def _is_storable(document_id: str) -> bool:
    """Say whether an id can be asked for: SQLite takes no lone surrogates, and no stored id has any."""
    try:
        document_id.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write a new store whose positions follow the order of `documents`; returns how many.

    Raises:
        sqlite3.IntegrityError: an id repeats.
        OSError: the disk is full.
    """
    return write_rows(path, ((d.id, d.title, d.text, dump_metadata(d.metadata)) for d in documents))


def write_rows(path: Path, rows: Iterable[Sequence[str]]) -> int:
    """Write rows of (id, title, text, metadata as JSON); see `write_documents`."""
    numbered = ((position, *row) for position, row in enumerate(rows))
    try:
        with closing(sqlite3.connect(path)) as connection:
            # a staging file that a crash throws away needs no journal; `publish` flushes it to disk
            connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA};")
            connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", numbered)
            connection.commit()
            return int(connection.execute("SELECT COUNT(*) FROM documents").fetchone()[0])
    except sqlite3.OperationalError as error:
        raise _as_os_error(error, path) from error


def document_of(columns: Sequence[str]) -> Document:
    """Return the document of a row's (id, title, text, metadata)."""
    return Document(columns[0], columns[1], columns[2], json.loads(columns[3]))


def dump_metadata(metadata: dict[str, Any]) -> str:
    """Return metadata as JSON; raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _as_os_error(error: sqlite3.OperationalError, path: Path) -> Exception:
    if error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
        return OSError(errno.ENOSPC, "disk full while writing documents", str(path))
    return error
