"""The benchmarks of trie and search: what they compare is right, and what they print is what they measured."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loadtest.bench import search as bench_search
from loadtest.bench import trie as bench_trie
from loadtest.bench.errors import BenchError
from loadtest.bench.search import read_queries
from loadtest.bench.timing import Figure, figures_table, medians_of
from loadtest.bench.unconstrained import StandInDecoder, decode_unconstrained
from models.lines import DataError
from service.index.bundle import Bundle, open_bundle
from service.index.trie import build_trie
from tests.tiny import make_bundle


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle")


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Iterator[Bundle]:
    opened = open_bundle(bundle_path)
    yield opened
    opened.close()


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def test_unconstrained_search_with_enough_beams_scores_every_sequence() -> None:
    rng = np.random.default_rng(0)
    offsets, size = (0, 3, 7), 7
    tokens, scale = unit(rng.normal(size=(size + 1, 8))), rng.uniform(2, 9, size).astype(np.float32)
    decoder = StandInDecoder(8)
    found, scores = decode_unconstrained(decoder.start(), 1, tokens, scale, offsets, 12)
    expected = {}
    for first, second in product(range(3), range(3, 7)):
        step, total = decoder.start(), 0.0
        for depth, (row, token) in enumerate([(size, first), (first, second)]):
            hidden = step(tokens[row][None, None], depth, np.zeros((1, 1), np.int64) if depth else None)[0, 0]
            level = list(range(*offsets[depth : depth + 2]))
            logits = scale[level].astype(np.float64) * (tokens[level] @ hidden)
            total += logits[level.index(token)] - np.log(np.exp(logits).sum())
        expected[first, second] = total
    assert {tuple(row) for row in found[0].tolist()} == set(expected)
    np.testing.assert_allclose(scores[0], [expected[tuple(row)] for row in found[0].tolist()], atol=1e-4)
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


def test_contenders_run_in_turns_after_one_round_to_warm_up() -> None:
    calls: list[str] = []
    medians = medians_of({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(medians) == {"a", "b"}


def test_table_says_whether_a_goal_is_met() -> None:
    assert Figure("x", 1.0, "s", 1.0).is_met
    assert Figure("x", 9.0, "s").is_met
    assert not Figure("x", 1.1, "s", 1.0).is_met
    out = io.StringIO()
    Console(file=out, width=100).print(figures_table("t", [Figure("speed", 2.0, "s", 1.0), Figure("size", 3.0, "B")]))
    assert "missed" in out.getvalue()
    assert "at most 1 s" in out.getvalue()


def test_trie_benchmark_measures_the_trie_it_built() -> None:
    out = io.StringIO()
    figures = {
        figure.name: figure.value for figure in bench_trie.run(3000, 3, 16, 500, (4,), 2, Console(file=out, width=120))
    }
    trie, _ = build_trie(bench_trie.random_sids(3000, 3, 16))
    assert figures["nodes"] == trie.nodes
    arrays = (trie.token_M, trie.lo_M, trie.child_M, trie.sids_NL)
    written = sum(array.nbytes + 128 for array in arrays)  # with the headers of .npy files
    assert figures["files per SID"] == pytest.approx(written / 3000)
    free, bound = figures["unconstrained decoding, beam 4, 3 steps"], figures["constrained decoding, beam 4, 3 steps"]
    assert figures["constrained / unconstrained, beam 4"] == pytest.approx(bound / free)
    assert "at most 32 B" in out.getvalue()


def test_search_benchmark_covers_every_scoring_and_beam(bundle_path: Path) -> None:
    out = io.StringIO()
    figures = bench_search.run(bundle_path, None, (3, 10), 4, over_http=False, console=Console(file=out, width=120))
    names = [figure.name for figure in figures]
    for scoring, beam in product(("generative", "guided", "geometric"), (3, 10)):
        assert f"walk outside onnxruntime, {scoring}, beam {beam}" in names
    assert all(0 < figure.value < 100 for figure in figures if figure.unit == "%")
    assert sum(name.startswith("constrained / unconstrained") for name in names) == 2
    assert "at most 10 %" in out.getvalue()


def test_http_is_measured_through_a_real_server(bundle_path: Path) -> None:
    console = Console(file=io.StringIO())
    figures = {f.name: f.value for f in bench_search.run(bundle_path, None, (2,), 3, console=console)}
    bare, over_http = figures["bare pipeline, beam 20"], figures["HTTP answer, beam 20"]
    assert 0 < bare < over_http
    assert figures["HTTP answer of /livez, the floor"] > 0
    assert figures["HTTP answer / bare pipeline"] == pytest.approx(over_http / bare)


def test_queries_come_from_a_file_or_from_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text("north star\n\n  rope \nkeel\n")
    assert read_queries(file, bundle, 2) == ["north star", "rope"]
    own = read_queries(None, bundle, 7)
    titles = {document.title for document in bundle.documents.many(range(60))}
    assert len(own) == 7
    assert set(own) <= titles
    file.write_text("\n")
    with pytest.raises(BenchError, match="holds no query"):
        read_queries(file, bundle, 5)
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_queries(file, bundle, 5)


def test_settings_of_another_service_do_not_reach_the_one_that_is_measured(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("METRICS_PORT", "0"), ("DEVICE", "nonsense"), ("MAX_TOP_K", "-1"), ("CACHE_DIR", "/tmp/k")):
        monkeypatch.setenv(f"RHUMB_{name}", value)
    given: list[dict[str, str]] = []

    class Popen:
        returncode = 7

        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            given.append(env)

        def poll(self) -> int:
            return 7

        def send_signal(self, number: int) -> None:
            """It has ended."""

        wait = send_signal

    monkeypatch.setattr(bench_search.subprocess, "Popen", Popen)
    with pytest.raises(BenchError, match="ended with status 7"), bench_search.served(bundle_path, 1):
        pass
    ours = {name for name in given[0] if name.startswith("RHUMB_")}
    assert ours == {"RHUMB_CACHE_DIR", "RHUMB_CACHE_ENTRIES", "RHUMB_DRAIN_SECONDS", "RHUMB_LOG_LEVEL"}
    assert given[0]["PATH"]


def test_server_that_cannot_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="ended with status"), bench_search.served(tmp_path, 1):
        pass
