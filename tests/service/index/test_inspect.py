"""`rhumb inspect` and `rhumb index`: figures against plain counting, and errors in one paragraph."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from service.index.artefact import ArtefactError
from service.index.bundle import open_bundle, open_model
from service.index.corpus import read_corpus
from service.index.inspect import inspect_artefact, level_use
from service.index.inspect_tables import collision_rows, render
from service.index.trie import build_trie, collision_sizes
from service.model.encoder import Encoder
from service.model.layout import LEVELS
from tests.tiny import make_bundle, make_documents

SIZES = (3, 4, 2)
OFFSETS = (0, 3, 7, 9)


@st.composite
def sids(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """SIDs of varying length over the levels of `SIZES`."""
    row = st.tuples(*(st.integers(first, last - 1) for first, last in pairwise(OFFSETS)))
    rows = draw(st.lists(st.tuples(row, st.integers(1, 3)), min_size=1, max_size=30))
    return [tuple(tokens[:length]) for tokens, length in rows]


def as_array(rows: list[tuple[int, ...]]) -> np.ndarray:
    table = np.full((len(rows), 3), -1, np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


@settings(max_examples=60)
@given(rows=sids())
def test_code_use_and_collisions_are_what_counting_says(rows: list[tuple[int, ...]]) -> None:
    trie, _ = build_trie(as_array(rows))
    assert Counter(collision_sizes(trie.sids_NL).tolist()) == Counter(Counter(rows).values())
    for use, first, last in zip(level_use(trie.sids_NL, OFFSETS), OFFSETS[:-1], OFFSETS[1:], strict=True):
        counts = Counter(token for row in rows for token in row if first <= token < last)
        total = sum(counts.values())
        assert (use.size, use.used, use.documents) == (last - first, len(counts), total)
        if total:
            shares = [count / total for count in counts.values()]
            assert use.entropy_bits == pytest.approx(-sum(s * math.log2(s) for s in shares), abs=1e-9)
            assert use.largest_share == pytest.approx(max(shares))
            every = [counts[token] for token in range(first, last)]
            differences = sum(abs(a - b) for a in every for b in every)  # the definition of the Gini coefficient
            assert use.gini == pytest.approx(differences / (2 * len(every) * total), abs=1e-9)


@given(collisions=st.dictionaries(st.integers(1, 70), st.integers(1, 9), min_size=1))
def test_the_ranges_of_the_collision_table_hold_everything_once(collisions: dict[int, int]) -> None:
    rows = collision_rows(collisions)
    assert sum(count for _, count, _ in rows) == sum(collisions.values())
    assert sum(documents for _, _, documents in rows) == sum(size * count for size, count in collisions.items())


def test_an_inspection_counts_what_the_bundle_holds(tiny_bundle: Path) -> None:
    inspection = inspect_artefact(tiny_bundle)
    index = inspection.index
    assert index is not None
    with closing(open_bundle(tiny_bundle)) as bundle:
        counted = Counter(bundle.trie.sid(position) for position in range(60))
    assert (index.documents, index.distinct_sids) == (60, len(counted))
    assert index.p_unique == len(counted) / 60
    assert index.collisions == Counter(counted.values())
    assert index.largest_collision == max(counted.values())
    for name, size in index.bytes_per_document.items():
        assert size == (tiny_bundle / name).stat().st_size / 60
    files = [path for path in tiny_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert inspection.verified_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_model"])
def test_the_tables_name_every_file_and_the_provenance(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the test
    with console.file:
        console.print(render(inspect_artefact(folder)))
        text = console.export_text()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.relative_to(folder).as_posix() in text
    assert "verified" in text
    assert "random numbers" in text


def test_packed_bytes_per_document_are_those_of_the_stored_codes(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", decoder=False, code_levels=LEVELS, dimensions=48, code_prefixes=(8, 40, 48))
    inspection = inspect_artefact(folder)
    assert inspection.index is not None
    for use in inspection.index.codes:
        stored = np.load(folder / f"codes_{use.level}.npy")
        assert use.bytes_per_document[48] == stored.nbytes / 64  # 60 documents in two blocks of 32
        assert use.float_share == stored.nbytes / 64 / (48 * 4)
    by_level = {use.level: use for use in inspection.index.codes}
    assert by_level["1"].bytes_per_document == {8: 8, 40: 16, 48: 24}
    assert by_level["2"].bytes_per_document == {8: 8, 40: 24, 48: 32}
    assert (by_level["0.5"].bits, by_level["hybrid"].bits) == (24, 12 * 3 + 12 * 2 + 12 + 6)
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the test
    with console.file:
        console.print(render(inspection))
        lines = console.export_text().splitlines()
    (row,) = (line for line in lines if line.split("│")[1:2] and line.split("│")[1].strip() == "hybrid")
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["8 B", "16 B", "24 B", "78", "12.5%"]


def test_a_damaged_artefact_is_not_described(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / "vectors.npy", 100)
    with pytest.raises(ArtefactError, match=r"vectors\.npy' has 100 bytes"):
        inspect_artefact(bundle_copy)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"_id": d.id, "title": d.title, "text": d.text}) for d in make_documents(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus.jsonl"


def test_index_then_inspect(run: Any, tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["index", "--model", str(tiny_model), "--corpus", str(corpus), "--out", str(tmp_path / "b")]
    code, out, err = run(*arguments, "--threads", "1")
    assert code == 0, err
    assert "30 documents on" in out
    report = json.loads(run("inspect", str(tmp_path / "b"), "--json")[1])
    assert report["index"]["documents"] == 30
    assert report["manifest"]["corpus"] == "corpus.jsonl"
    assert run("inspect", str(tmp_path / "b"))[0] == 0
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert "exists: choose another folder, or ask for it to be replaced (--replace)" in err
    assert run(*arguments, "--replace")[0] == 0


def test_index_takes_vectors_from_a_file(run: Any, tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    model = open_model(tiny_model)
    encoder = Encoder(model.encoder_file, model.tokenizer_file, model.manifest.text, 1)
    texts = [(document.title, document.text) for document in read_corpus(corpus)]
    np.save(tmp_path / "v.npy", encoder.encode_documents(texts, lambda _: None))
    arguments = ["index", "--model", str(tiny_model), "--corpus", str(corpus), "--out", str(tmp_path / "b")]
    code, _, err = run(*arguments, "--vectors", str(tmp_path / "v.npy"))
    assert code == 0, err
    assert "encoding" not in err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "corpus.jsonl").write_text("{}\n"), "corpus.jsonl:1: field '_id' is missing"),
        (lambda folder: (folder / "corpus.jsonl").unlink(), "corpus.jsonl: does not exist"),
        (lambda folder: (folder / "v.npy").write_bytes(b"nothing"), "v.npy' is not a .npy file"),
        (lambda folder: np.save(folder / "v.npy", np.zeros((30, 16), int)), "does not hold an array of floats"),
        (lambda folder: np.save(folder / "v.npy", np.ones((30, 3), np.float32)), "shape (30, 3)"),
        (lambda folder: None, "No such file or directory: "),
    ],
)
def test_what_the_user_got_wrong_is_one_paragraph_and_exit_code_1(
    run: Any, tiny_model: Path, corpus: Path, tmp_path: Path, spoil: object, words: str
) -> None:
    spoil(tmp_path)  # type: ignore[operator]
    arguments = ["index", "--model", str(tiny_model), "--corpus", str(corpus), "--out", str(tmp_path / "b")]
    code, _, err = run(*arguments, *(["--vectors", str(tmp_path / "v.npy")] if "corpus" not in words else []))
    assert code == 1
    message = err[err.index("error: ") :]
    assert words in message
    assert message.count("\n") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "b").exists()


def test_inspecting_nothing_is_exit_code_1(run: Any, tmp_path: Path) -> None:
    code, _, err = run("inspect", str(tmp_path))
    assert code == 1
    assert err.startswith(f"error: '{tmp_path}' has no manifest.json")


def test_debugging_shows_the_traceback(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_DEBUG", "1")
    with pytest.raises(ArtefactError, match=r"has no manifest\.json"):
        run("inspect", str(tmp_path))
