"""Reading BEIR folders and writing TREC runs: every error names its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data import DataError, load_dataset, read_interactions, read_qrels, read_queries, read_vectors, write_run


def write_folder(folder: Path, **changes: str) -> Path:
    """A folder of two documents, three queries and one split; keywords replace the text of a file."""
    files = {
        "corpus.jsonl": '{"_id": "d1", "title": "One", "text": "first"}\n{"_id": "d2", "text": "second"}\n',
        "queries.jsonl": "".join(json.dumps({"_id": f"u-{i}", "text": f"query {i}"}) + "\n" for i in range(3)),
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nu-1\td2\t1\nu-2\td1\t0\n",
    }
    (folder / "qrels").mkdir()
    for name, text in (files | {key.replace("__", "/"): value for key, value in changes.items()}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_gives_documents_queries_and_judgements(tmp_path: Path) -> None:
    data = load_dataset(write_folder(tmp_path))
    assert [d.id for d in data.documents] == ["d1", "d2"]
    assert data.queries["u-2"] == "query 2"
    assert data.qrels == {"test": {"u-1": {"d2": 1}, "u-2": {"d1": 0}}}
    assert data.judged("test") == ["u-1"]  # u-2 has only a grade of 0
    assert data.pairs("test") == [("u-1", 1)]
    assert data.popularity("test").tolist() == [0, 1]


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    data = load_dataset(write_folder(tmp_path))
    with pytest.raises(DataError, match="no split 'dev', there are: test"):
        data.judged("dev")
    with pytest.raises(DataError, match=r"qrels/dev\.tsv: no such file"):
        load_dataset(tmp_path, splits=["dev"])


def test_judgements_of_unknown_ids_are_refused_with_counts_and_examples(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, **{"qrels__test.tsv": "u-1\td9\t1\nu-1\td8\t1\nu-0\td1\t1\n"})
    with pytest.raises(DataError, match=r"test\.tsv: 2 unknown corpus-id values, e\.g\. 'd9', 'd8' \(2 are known\)"):
        load_dataset(folder)
    (folder / "qrels/test.tsv").write_text("u-9\td1\t1\n")
    with pytest.raises(DataError, match=r"1 unknown query-id values, e\.g\. 'u-9'"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"queries\.jsonl:2: not JSON"),
        ("[1]", r":2: a list, must be a JSON object"),
        ('{"text": "x"}', r":2: field '_id' is missing"),
        ('{"_id": "a"}', r":2: field 'text' is missing"),
        ('{"_id": "a", "text": "  "}', r":2: field 'text' is '  '"),
        ('{"_id": 7, "text": "x"}', r":2: field '_id' is 7"),
        ('{"_id": "q", "text": "x"}', r":2: field '_id' repeats 'q'"),
        ('{"_id": "a", "text": "x", "history": "h"}', r":2: field 'history' must be a list"),
        (r'{"_id": "a", "text": "\ud800"}', r":2: field 'text' holds a lone surrogate"),
    ],
)
def test_a_bad_query_is_named_by_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"_id": "q", "text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_queries(path))


def test_invalid_utf8_is_named_by_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_bytes(b'{"_id": "q", "text": "fine"}\n{"_id": "\xff"}\n')
    with pytest.raises(DataError, match=r"queries\.jsonl:2: not UTF-8 at byte 9"):
        list(read_queries(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u d 1", r"qrels\.tsv:2: 1 tab-separated fields"),
        ("u\td\t1.5", r":2: field 'score' is '1\.5'"),
        ("\td\t1", r":2: field 'query-id' is empty"),
        ("u\t \t1", r":2: field 'corpus-id' is empty"),
        ("u\te\t1\nu\te\t2", r":3: .*judged twice"),
    ],
)
def test_a_bad_judgement_is_named_by_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text("query-id\tcorpus-id\tscore\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_qrels(path))


def test_histories_come_from_sequences_or_the_query_itself(tmp_path: Path) -> None:
    queries = '{"_id": "u-2", "text": "x"}\n{"_id": "v", "text": "y", "history": ["d1", "free text"]}\n'
    qrels = "u-2\td1\t1\n"
    sequences = '{"user": "u", "items": ["d2", "d1", "d2"]}\n'
    changes = {"queries.jsonl": queries, "qrels__test.tsv": qrels, "sequences.jsonl": sequences}
    folder = write_folder(tmp_path, **changes)
    assert load_dataset(folder).histories == {}
    assert load_dataset(folder, history=10).histories == {"u-2": ("second", "One"), "v": ("One", "free text")}
    assert load_dataset(folder, history=1).histories == {"u-2": ("One",), "v": ("free text",)}
    (folder / "sequences.jsonl").write_text('{"user": "u", "items": ["d7"]}\n')
    with pytest.raises(DataError, match=r"sequences\.jsonl: 1 unknown item values, e\.g\. 'd7'"):
        load_dataset(folder, history=1)


def test_of_a_user_only_the_last_query_is_followed_by_none(tmp_path: Path) -> None:
    qrels = "u-0\td1\t1\nu-2\td1\t1\nu-1\td2\t1\n"
    folder = write_folder(tmp_path, **{"qrels__train.tsv": qrels})
    assert load_dataset(folder).followed("train") == set(), "without sequences, queries have no order"
    (folder / "sequences.jsonl").write_text('{"user": "u", "items": ["d2", "d1", "d2"]}\n')
    assert load_dataset(folder).followed("train") == {"u-0", "u-1"}


def test_interactions_of_unknown_items_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "interactions.tsv"
    path.write_text("corpus-id\tcount\nd1\t3\nd2\t0\n")
    assert read_interactions(path, {"d1": 0, "d2": 1}) == {"d1": 3, "d2": 0}
    with pytest.raises(DataError, match=r"1 unknown document values, e\.g\. 'd2'"):
        read_interactions(path, {"d1": 0})
    path.write_text("d1\t-3\n")
    with pytest.raises(DataError, match=r"interactions\.tsv:1: need corpus-id"):
        read_interactions(path, {"d1": 0})


def test_vectors_are_read_in_the_order_wanted(tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", np.arange(6, dtype=np.float16).reshape(3, 2))
    (tmp_path / "docs.ids.txt").write_text("a\nb\nc\n")
    rows = read_vectors(tmp_path / "docs.npy", tmp_path / "docs.ids.txt", ["c", "a"])
    assert rows.dtype == np.float32
    assert rows.tolist() == [[4, 5], [0, 1]]
    with pytest.raises(DataError, match=r"1 unknown id values, e\.g\. 'z'"):
        read_vectors(tmp_path / "docs.npy", tmp_path / "docs.ids.txt", ["z"])
    (tmp_path / "docs.ids.txt").write_text("a\nb\n")


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        ("a\nb\n", "2 distinct rows in 2 lines"),
        ("a\n\nc\n", "2 distinct rows in 2 lines"),  # blank: whose row is the third?
        ("a\nb\na\n", "2 distinct rows in 3 lines"),
        ("a\nb\nb\nc\n", "3 distinct rows in 4 lines"),
    ],
)
def test_every_row_of_vectors_has_an_id_of_its_own(ids: str, counts: str, tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", np.zeros((3, 2), np.float16))
    (tmp_path / "docs.ids.txt").write_text(ids)
    with pytest.raises(DataError, match=rf"shape \(3, 2\), but .* names {counts}: give every row an id of its own"):
        read_vectors(tmp_path / "docs.npy", tmp_path / "docs.ids.txt", ["a"])


@settings(max_examples=50)
@given(scores=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30))
def test_a_reader_that_sorts_a_run_by_score_finds_the_written_order(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float]
) -> None:
    """Ties are broken by score, whatever the ids: sorting by float32 score gives the ranks back."""
    path = tmp_path_factory.mktemp("run") / "run.trec"
    ranked = sorted(scores, reverse=True)
    write_run(path, {"q": [(f"d{len(ranked) - i}", score) for i, score in enumerate(ranked)]}, "tag")
    rows = [line.split(" ") for line in path.read_text().splitlines()]
    assert all(len(row) == 6 and row[1] == "Q0" for row in rows)
    by_score = sorted(rows, key=lambda row: -np.float32(row[4]))
    assert [int(row[3]) for row in by_score] == list(range(1, len(ranked) + 1))
    assert len({np.float32(row[4]) for row in rows}) == len(rows)
    np.testing.assert_allclose([float(row[4]) for row in rows], ranked, rtol=1e-5, atol=1e-30)


def test_a_run_refuses_white_space_and_rising_scores(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a b' cannot stand in a TREC run"):
        write_run(tmp_path / "r", {"q": [("a b", 1.0)]}, "t")
    with pytest.raises(DataError, match=r"rank 2: score 2\.0 after 1\.0"):
        write_run(tmp_path / "r", {"q": [("a", 1.0), ("b", 2.0)]}, "t")
    with pytest.raises(DataError, match="rank 1: score nan"):
        write_run(tmp_path / "r", {"q": [("a", float("nan"))]}, "t")


@pytest.mark.data
def test_the_development_sets_are_read_whole(datasets: Path) -> None:
    data = load_dataset(datasets / "squad-dev")
    assert (len(data.documents), len(data.judged("train")), len(data.judged("test"))) == (2067, 8477, 2093)
