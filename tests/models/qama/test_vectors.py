"""Several sources of vectors as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.lines import DataError
from models.qama.vectors import read_all, read_vectors
from tests.tiny import make_documents, make_model


def write_folder(folder: Path, documents: int, pairs: list[tuple[int, int]], seed: int) -> Path:
    """A folder of vectors; without pairs it has no queries."""
    rng = np.random.default_rng(seed)
    (folder / "qrels").mkdir(parents=True)
    np.save(folder / "docs.npy", rng.normal(size=(documents, 4)).astype(np.float32))
    (folder / "docs.ids.txt").write_text("".join(f"d{i}\n" for i in range(documents)))
    if pairs:
        np.save(folder / "queries_train.npy", rng.normal(size=(len(pairs), 4)).astype(np.float32))
        (folder / "queries_train.ids.txt").write_text("".join(f"q{i}\n" for i in range(len(pairs))))
        (folder / "qrels/train.tsv").write_text("".join(f"q{q}\td{d}\t1\n" for q, d in pairs))
    return folder


def test_pairs_still_name_the_same_vectors(tmp_path: Path) -> None:
    sources = [
        write_folder(tmp_path / "a", 3, [(0, 2), (1, 1)], 1),
        write_folder(tmp_path / "b", 2, [], 2),
        write_folder(tmp_path / "c", 4, [(0, 3)], 3),
    ]
    found = read_all(sources)
    assert found.queries is not None
    assert found.pairs is not None
    assert (found.documents.shape, found.queries.shape, found.pairs.shape) == ((9, 4), (3, 4), (3, 2))
    alone = [read_all([source]) for source in sources]
    expected = [
        (alone[n].queries[q], alone[n].documents[d])  # type: ignore[index]  # a and c have queries
        for n, q, d in ((0, 0, 2), (0, 1, 1), (2, 0, 3))
    ]
    for (query, document), (row, position) in zip(expected, found.pairs, strict=True):
        assert np.array_equal(found.queries[row], query)
        assert np.array_equal(found.documents[position], document)


def test_documents_alone_have_no_queries(tmp_path: Path) -> None:
    found = read_all([write_folder(tmp_path / "a", 3, [], 1), write_folder(tmp_path / "b", 2, [], 2)])
    assert (len(found.documents), found.queries, found.pairs) == (5, None, None)


def test_other_widths_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match=r"one width are needed, found \[2, 4\]"):
        read_all([write_folder(tmp_path / "a", 3, [], 1), tmp_path / "narrow.npy"])


@pytest.mark.parametrize("name", ["docs", "queries_train"])
@pytest.mark.parametrize("last", ["", "\n", "{0}1\n", "{0}1\n{0}2\n"])
def test_rows_without_an_id_of_their_own_are_refused(name: str, last: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 3, [(0, 0), (1, 1), (2, 2)], 1)
    (folder / f"{name}.ids.txt").write_text(("{0}0\n{0}1\n" + last).format(name[0]))
    with pytest.raises(DataError, match=rf"{name}\.npy: shape \(3, 4\), but .*{name}\.ids\.txt names . distinct rows"):
        read_vectors(folder)


def write_texts(folder: Path, texts: dict[str, str], **splits: list[str]) -> None:
    """queries.jsonl, and qrels files in which every query asks for the first document."""
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": text}) for i, text in texts.items()))
    for split, ids in splits.items():
        (folder / f"qrels/{split}.tsv").write_text("".join(f"{id_}\td0\t1\n" for id_ in ids))


TEXTS = {"q0": "open a file", "q1": "Sort  a LIST", "q2": "close it", "q3": "copy", "t": "sort a list", "v": "close it"}


def test_train_queries_that_ask_what_another_split_does_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "a", 4, [(0, 3), (1, 1), (2, 2), (3, 0)], 1)
    everything = read_vectors(folder)  # without texts nothing is known
    assert everything.queries is not None
    write_texts(folder, TEXTS, test=["t"], dev=["v"])
    found = read_vectors(folder)
    assert found.queries is not None
    assert found.pairs is not None
    np.testing.assert_array_equal(found.queries, everything.queries[[0, 3]])
    assert found.pairs.tolist() == [[0, 3], [1, 0]]
    assert "2 of 4 train queries ask what a query of dev, test does: left out" in capsys.readouterr().err
    read_vectors(folder, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_encoded_leaves_them_out_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 1, [(0, 0)], 1)
    lines = [json.dumps({"_id": d.id, "title": d.title, "text": d.text}) for d in make_documents(4)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    write_texts(folder, TEXTS, train=["q0", "q1", "q2", "q3"], test=["t"], dev=["v"])
    model = make_model(tmp_path / "model", decoder=False)
    found = read_vectors(folder, model, quiet=True)
    assert found.queries is not None
    assert found.pairs is not None
    assert (len(found.queries), found.pairs.tolist()) == (2, [[0, 0], [1, 0]])
    write_texts(folder, TEXTS, train=["q1", "q2"])
    alone = read_vectors(folder, model, quiet=True)
    assert (len(alone.documents), alone.queries, alone.pairs) == (4, None, None)


def test_train_queries_without_a_text_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 2, [(0, 0), (1, 1)], 1)
    write_texts(folder, {"q0": "open a file", "t": "sort a list"}, test=["t"])
    with pytest.raises(DataError, match=r"queries\.jsonl: 1 unknown query values, e\.g\. 'q1'"):
        read_vectors(folder)
