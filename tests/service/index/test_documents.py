"""The document store: what goes in comes out, in any order, from any thread, and nothing can be written."""

from __future__ import annotations

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.index.documents import READERS, Document, DocumentStore, write_documents

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.lists(
    st.builds(Document, TEXT.filter(bool), TEXT, TEXT, st.dictionaries(TEXT, VALUES, max_size=3)),
    max_size=12,
    unique_by=lambda document: document.id,
)


@pytest.fixture
def store(tmp_path: Path) -> DocumentStore:
    documents = [Document(f"d{i}", f"title {i}", f"text {i}", {"i": i}) for i in range(1200)]
    write_documents(tmp_path / "d.sqlite", documents)
    return DocumentStore(tmp_path / "d.sqlite")


@settings(max_examples=60)
@given(documents=DOCUMENTS)
def test_documents_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document]
) -> None:
    path = tmp_path_factory.mktemp("store") / "d.sqlite"
    assert write_documents(path, iter(documents)) == len(documents)
    with closing(DocumentStore(path)) as store:
        assert len(store) == len(documents)
        assert store.many(range(len(documents))) == documents
        for position, document in enumerate(documents):
            assert store.by_id(document.id) == position
            assert store.get(position) == document


def test_many_keeps_the_asked_order_and_repeats_across_statements(store: DocumentStore) -> None:
    positions = [7, 3, 7, *range(1199, 0, -1), 0]
    assert [document.metadata["i"] for document in store.many(positions)] == positions
    assert store.many([]) == []
    store.close()


def test_texts_and_metadata_are_read_where_they_are_wanted(store: DocumentStore) -> None:
    named = store.many([3, 0], whole=False)
    assert named == [replace(document, text="", metadata={}) for document in store.many([3, 0])]
    with pytest.raises(IndexError, match="no document at position"):
        store.many([len(store)], whole=False)
    store.close()


def test_positions_of_ids_come_in_their_order_with_repeats_and_none(store: DocumentStore) -> None:
    numbers = [5, 1199, 5, *range(1200)]
    assert store.positions_of([f"d{number}" for number in numbers]) == numbers
    assert store.positions_of(["d3", "", "\ud800", "D3", "d1200", "d4"]) == [3, None, None, None, None, 4]
    assert store.positions_of([]) == []
    store.close()


@pytest.mark.parametrize("position", [-1, 1200, 2**40])
def test_a_position_outside_is_an_index_error_with_numbers(store: DocumentStore, position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position}: the bundle holds 1200"):
        store.many([0, position])
    store.close()


@pytest.mark.parametrize("unknown", ["", "d1200", "D1", "d1 ", "\ud800", "d1\x00", "x" * 100_000, "' OR 1=1 --"])
def test_an_unknown_id_is_none(store: DocumentStore, unknown: str) -> None:
    assert store.by_id(unknown) is None
    store.close()


def test_many_threads_read_at_once(store: DocumentStore) -> None:
    barrier = threading.Barrier(8)

    def read(first: int) -> bool:
        barrier.wait()
        return all(store.get(i).id == f"d{i}" and store.by_id(f"d{i}") == i for i in range(first, 1200, 40))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    store.close()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_all_readers_keep_the_documents_that_were_opened(
    store: DocumentStore, tmp_path: Path, is_replaced: bool
) -> None:
    """A server goes on with its bundle where another has taken its place, or none."""
    if is_replaced:
        write_documents(tmp_path / "new.sqlite", [Document("other", "", "of another bundle")])
        (tmp_path / "new.sqlite").replace(tmp_path / "d.sqlite")
    else:
        (tmp_path / "d.sqlite").unlink()
    with ExitStack() as busy:
        for _ in range(READERS - 1):
            busy.enter_context(store._connection())
            assert store.get(7).text == "text 7"
            assert store.by_id("d1199") == 1199
    store.close()


def test_more_threads_than_connections_take_turns(store: DocumentStore) -> None:
    with ThreadPoolExecutor(2 * READERS) as pool:
        found = list(pool.map(store.get, range(600)))
    assert [document.metadata["i"] for document in found] == list(range(600))
    store.close()


def test_threads_that_come_and_go_leave_no_open_file_behind(store: DocumentStore, tmp_path: Path) -> None:
    def opened() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(os.path.realpath(link) == str(tmp_path / "d.sqlite") for link in links)

    for number in range(50):
        thread = threading.Thread(target=store.get, args=(number,))
        thread.start()
        thread.join()
    assert opened() == READERS
    store.close()
    assert opened() == 0


def test_the_store_cannot_be_written(store: DocumentStore, tmp_path: Path) -> None:
    before = (tmp_path / "d.sqlite").read_bytes()
    with pytest.raises(sqlite3.OperationalError, match="readonly"), store._connection() as connection:
        connection.execute("DELETE FROM documents")
    store.close()
    assert (tmp_path / "d.sqlite").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["d.sqlite"]


def test_a_closed_store_refuses_the_thread_that_closed_it(store: DocumentStore) -> None:
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.get(0)


def test_a_path_with_characters_that_mean_something_in_a_uri_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "a?mode=rwc&b#c%20d"
    folder.mkdir()
    write_documents(folder / "d.sqlite", [Document("x", "", "y")])
    with closing(DocumentStore(folder / "d.sqlite")) as store:
        assert store.get(0).text == "y"


def test_positions_with_a_gap_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "d.sqlite", [Document(str(i), "", "y") for i in range(3)])
    with closing(sqlite3.connect(tmp_path / "d.sqlite")) as connection:
        connection.execute("DELETE FROM documents WHERE position = 1")
        connection.commit()
    with pytest.raises(ValueError, match="2 documents with positions up to 2"):
        DocumentStore(tmp_path / "d.sqlite")


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        write_documents(tmp_path / "d.sqlite", [Document("x", "", "y"), Document("x", "", "z")])
