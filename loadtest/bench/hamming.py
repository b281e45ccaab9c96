"""`rhumb bench hamming`: our scan against its peers and against the machine's limits.

All contenders of a workload run in turns, so that a noisy minute hits them alike; medians are compared. Codes are
random and lie in a read-only memory map, as in a bundle. Before anything is timed, every contender's distances are
held to ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from loadtest.bench import roofline
from loadtest.bench.errors import BenchError
from loadtest.bench.hamming_peers import (
    FEW,
    Contender,
    Peer,
    faiss_binary,
    fp32_flat,
    missing_peers,
    paper_numpy,
    rhumb,
    usearch_exact,
)
from loadtest.bench.hamming_report import Cell, cells_table, goals_table, plot_cells
from service.model.packing import to_blocks
from service.ops.cpus import available_cpus
from service.ops.progress import progress_bar
from service.search.hamming import HammingIndex

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
WIDTHS = (12, 20, 24, 36)
QUERIES = (1, 32, 1000)
KS = (10, 100)
HUGE = 2_000_000  # documents; above it only 12 words, and no FP32 (3 KB a document)
ROUNDS = 9
TABLE_COLUMNS = 110  # of a terminal or of a file, where rich would assume 80 and cut the figures
Words = npt.NDArray[np.uint64]


def run(
    sizes: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    quick: bool = False,
    plot: Path | None = None,
    console: Console | None = None,
) -> list[Cell]:
    """Measure, print the tables, and draw the plot.

    Args:
        sizes: numbers of documents; default 10^4 to 10^7.
        widths: words of a code; default 12, 20, 24, 36. Sizes above two millions run at 12 words only.
        quick: 10^4 and 10^5 documents, 12 and 36 words, 1 and 32 queries, k 10: seconds instead of minutes.
        plot: PNG file to write.
        console: where the tables go; default stdout, wide enough for all columns.

    Returns:
        The medians of every workload.

    Raises:
        BenchError: no such workload.
        RuntimeError: a contender found other distances than we did.
    """
    console = console or Console(width=max(TABLE_COLUMNS, Console().width))
    corpora = _corpora(
        tuple(sizes or (SIZES[:2] if quick else SIZES)), tuple(widths or ((12, 36) if quick else WIDTHS))
    )
    workloads = list(product(QUERIES[:2], KS[:1]) if quick else product(QUERIES, KS))
    roofline.warm_up()
    cells: list[Cell] = []
    with progress_bar("bench", sum(map(len, corpora.values())) * len(workloads)) as advance:
        for documents, its_widths in corpora.items():
            shared = _shared_peers(documents)
            for words in its_widths:
                with _mapped_codes(documents, words) as (codes_NW, codes_GWV), _peers(codes_NW, codes_GWV) as peers:
                    for queries, k in workloads:
                        cells.append(_measure([*peers, *shared], codes_GWV, documents, queries, k))
                        advance(1)
    _report(cells, plot, console)
    return cells


def _corpora(sizes: tuple[int, ...], widths: tuple[int, ...]) -> dict[int, list[int]]:
    """The widths that run at each size."""
    corpora = {n: [w for w in widths if n <= HUGE or w == 12] for n in sizes}
    if min(sizes) < max(KS) or min(widths) < 1 or not all(corpora.values()):
        raise BenchError(
            f"sizes {sizes} and widths {widths} leave nothing to run: at least {max(KS)} documents and one word, "
            f"and 12 words above {HUGE:,} documents"
        )
    return corpora


@contextmanager
def _mapped_codes(documents: int, words: int) -> Iterator[tuple[Words, Words]]:
    """Random codes twice: as rows in memory for the peers, and in our form as a read-only map."""
    codes_NW = np.random.default_rng(words).integers(0, 2**64, (documents, words), dtype=np.uint64)
    with tempfile.TemporaryDirectory(prefix="rhumb-bench-") as folder:
        np.save(Path(folder) / "codes.npy", to_blocks(codes_NW))
        yield codes_NW, np.load(Path(folder) / "codes.npy", mmap_mode="r", allow_pickle=False)


@contextmanager
def _peers(codes_NW: Words, codes_GWV: Words) -> Iterator[list[Peer]]:
    """Ours on one and two cores, and the peers that search the same codes."""
    missing = missing_peers()
    with HammingIndex(codes_GWV, len(codes_NW)) as one, HammingIndex(codes_GWV, len(codes_NW), threads=2) as two:
        one.warm_up()
        peers = [rhumb(one), paper_numpy(codes_NW)]
        if available_cpus() > 1:
            peers.append(rhumb(two))
        if "faiss" not in missing:
            peers.append(faiss_binary(codes_NW))
        if "usearch" not in missing:
            peers.append(usearch_exact(codes_NW))
        yield peers


def _shared_peers(documents: int) -> list[Peer]:
    """FP32 vectors, which no width changes."""
    return [fp32_flat(documents)] if documents <= HUGE and "faiss" not in missing_peers() else []


def _measure(peers: Sequence[Peer], codes_GWV: Words, documents: int, queries: int, k: int) -> Cell:
    """Run all contenders of one workload in turns, with the machine's limits between them."""
    words = codes_GWV.shape[1]
    queries_QW = np.random.default_rng(queries).integers(0, 2**64, (queries, words), dtype=np.uint64)
    contenders = [contender for peer in peers for contender in peer(queries_QW, k)]
    _first_round(contenders)
    limits = []
    for _ in range(ROUNDS):
        limits.append((roofline.read_bandwidth(codes_GWV), roofline.popcount_peak()))
        for contender in contenders:
            if not contender.tired:
                contender.run()
    bandwidth, peak = np.median(limits, axis=0)
    seconds = {contender.name: contender.median(queries) for contender in contenders}
    return Cell(documents, words, queries, k, seconds, float(bandwidth), float(peak))


def _first_round(contenders: Sequence[Contender]) -> None:
    """Warm up, and hold every peer's distances to ours, which come first."""
    ours = contenders[0].first_run()
    for contender in contenders[1:]:
        found = contender.first_run()
        if found is not None and ours is not None and not np.array_equal(found[:FEW], ours[:FEW]):
            raise RuntimeError(f"{contender.name} found other distances than rhumb: {found[0]} and {ours[0]}")


def _report(cells: Sequence[Cell], plot: Path | None, console: Console) -> None:
    """Print the tables, what they rest on, and what was left out."""
    console.print(cells_table(cells), goals_table(cells))
    bandwidth, peak = (np.median([(c.read_bandwidth, c.popcount_peak) for c in cells], axis=0) / 1e9).round(1)
    packages = [f"{name} {version(name)}" for name in ("numpy", "numba", "faiss-cpu", "usearch") if _installed(name)]
    console.print(f"One core reads {bandwidth} GB/s and counts {peak} GB/s. {', '.join(packages)}.")
    console.print(f"numpy and usearch were timed on {FEW} queries, FP32 on up to 64, and scaled; all on one core.")
    skipped = [f"{name} (not installed)" for name in missing_peers()]
    skipped += ["two cores (one available)"] if available_cpus() < 2 else []
    skipped += [f"FP32 above {HUGE:,} documents"] if any(c.documents > HUGE for c in cells) else []
    if skipped:
        console.print(f"Skipped: {', '.join(skipped)}.")
    if plot is not None:
        plot_cells(cells, plot)
        console.print(f"Plot: {plot}")


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
