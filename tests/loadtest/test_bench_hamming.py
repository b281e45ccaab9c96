"""The Hamming bench: it holds its contenders to each other, and its ratios are plain quotients."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loadtest.bench import hamming, hamming_peers, roofline
from loadtest.bench.errors import BenchError
from loadtest.bench.hamming_peers import Contender
from loadtest.bench.hamming_report import Cell, goals_table, plot_cells


def make_cell(queries: int = 32, **seconds: float) -> Cell:
    named = {name.replace("_", " "): value for name, value in seconds.items()}
    return Cell(1_000_000, 12, queries, 10, named, read_bandwidth=32e9, popcount_peak=320e9)


def render(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "ROUNDS", 1)
    monkeypatch.setattr(hamming, "QUERIES", (1, 32))
    monkeypatch.setattr(hamming_peers, "RUN_SECONDS", 0.0)
    monkeypatch.setattr(roofline, "_CACHE_PASSES", 10)


@pytest.mark.usefixtures("brief")
def test_a_small_run_times_every_installed_contender_and_prints_every_goal(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is a development dependency")
    out = io.StringIO()
    cells = hamming.run([300], [2], quick=True, plot=tmp_path / "plot.png", console=Console(file=out, width=120))
    assert [(c.documents, c.words, c.queries, c.k) for c in cells] == [(300, 2, 1, 10), (300, 2, 32, 10)]
    for cell in cells:
        assert {"rhumb", "numpy", "faiss heap", "faiss count", "fp32 plain", "fp32 blas"} <= cell.seconds.keys()
        assert all(seconds > 0 for seconds in cell.seconds.values())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "times faster than faiss, 1,000 queries" in out.getvalue()
    assert "not run" in out.getvalue()


def test_a_contender_with_other_distances_stops_the_bench() -> None:
    right = Contender("rhumb", lambda: np.array([[1, 2]]), 1)
    wrong = Contender("wrong", lambda: np.array([[1, 3]]), 1)
    with pytest.raises(RuntimeError, match="wrong found other distances"):
        hamming._first_round([right, wrong])


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming_peers, "find_spec", lambda name: None if name == "usearch" else object())
    assert hamming_peers.missing_peers() == ["usearch"]


def test_a_peer_counts_with_its_quickest_variant_scaled_to_all_queries() -> None:
    few = Contender("numpy", lambda: None, 2, seconds=[0.3, 0.1, 0.2])
    assert few.median(32) == pytest.approx(3.2)
    cell = make_cell(rhumb=0.01, faiss_heap=0.09, faiss_count=0.08, rhumb_x2=0.005)
    assert cell.times("faiss") == pytest.approx(8.0)
    assert cell.times("numpy") is None
    assert cell.two_cores == pytest.approx(2.0)
    assert cell.rate == pytest.approx(1_000_000 * 12 * 8 * 32 / 0.01)


def test_a_goal_is_judged_by_its_worst_workload() -> None:
    good, bad = make_cell(rhumb=0.01, faiss_heap=0.08), make_cell(rhumb=0.01, faiss_heap=0.06)
    rows = {line.split("│")[1].strip(): line for line in render(goals_table([good, bad])).splitlines() if "│" in line}
    assert "missed" in rows["times faster than faiss, 32 queries"]
    assert "6.00" in rows["times faster than faiss, 32 queries"]
    assert "met" in rows["of popcount peak, batches"]  # 307 of 320 GB/s
    assert "not run" in rows["times faster than numpy, batches"]


def test_the_limits_count_every_word() -> None:
    words = np.arange(4096, dtype=np.uint64)
    assert roofline.read_all(words) == words.sum()
    expected = sum(int(np.bitwise_count(words ^ np.uint64(query)).sum()) for query in range(3))
    assert roofline.count_all(words, 3) == expected


def test_the_peak_reads_whole_cache_lines_and_is_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        words = roofline.aligned_words(2048)
        assert words.ctypes.data % 64 == 0
        assert words.tolist() == list(range(2048))
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0, 30.0, 34.0, 40.0, 46.0])  # 3, 2, 5, 4 and 6 seconds
    seen: list[int] = []
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(roofline, "count_all", lambda words, passes: seen.append(words.ctypes.data % 64 or passes))
    assert roofline.popcount_peak() == 2048 * 8 * roofline._CACHE_PASSES / 2
    assert seen == [roofline._CACHE_PASSES] * 5


@pytest.mark.parametrize(("sizes", "widths"), [([50], [12]), ([3_000_000], [20]), ([1_000], [0])])
def test_workloads_that_cannot_run_are_refused(sizes: list[int], widths: list[int]) -> None:
    with pytest.raises(BenchError, match="leave nothing to run"):
        hamming.run(sizes, widths)


def test_sizes_beyond_a_million_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib belongs to the extra [train]")
    cell = Cell(10_000_000, 12, 1, 10, {"rhumb": 0.03}, 32e9, 320e9)
    plot_cells([cell], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_goals_are_read_at_a_million_or_at_what_there_is() -> None:
    def title(*documents: int) -> str:
        cells = [replace(make_cell(rhumb=0.01), documents=n) for n in documents]
        return str(goals_table(cells).title)

    assert title(10_000, 1_000_000, 10_000_000) == "Goals at 1,000,000 documents"
    assert title(10_000_000) == "Goals at 10,000,000 documents"
