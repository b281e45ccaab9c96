"""Several sources of vectors as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.lines import DataError
from models.qama.vectors import read_all


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
