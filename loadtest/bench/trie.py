"""`rhumb bench trie`: build, size, opening, and what the constraint costs.

Legend: N documents, L levels, K codes of a level, T tokens, E token dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from loadtest.bench.timing import Figure, figures_table, medians_of
from loadtest.bench.unconstrained import CONSTRAINT_GOAL, StandInDecoder, decode_unconstrained
from service.index.regions import Regions
from service.index.trie import Trie, build_trie, open_trie, save_trie, verify_trie
from service.search.tables import WalkTables
from service.search.walk import walk

SECONDS_GOAL = 10.0  # to build 10 million SIDs
BYTES_GOAL = 32.0  # per SID, over all files
OPEN_GOAL = 10.0  # milliseconds
EMBEDDING_DIMENSIONS = 384  # of the stand-in decoder


def run(
    sids: int = 10_000_000,
    levels: int = 5,
    codes: int = 256,
    decoded_sids: int = 1_000_000,
    beams: tuple[int, ...] = (10, 50, 100),
    rounds: int = 50,
    console: Console | None = None,
) -> list[Figure]:
    """Measure the trie on random SIDs, print a table, and return the figures.

    Args:
        sids: N for build, size and opening; 0 to skip them.
        levels: L.
        codes: K.
        decoded_sids: N for the cost of the constraint; 0 to skip it.
        beams: beam widths for the cost of the constraint.
        rounds: repetitions of each decoding; the median counts.
        console: where to print.
    """
    console, figures = console or Console(), []
    if sids:
        figures += measure_build(random_sids(sids, levels, codes), rounds)
        console.print(figures_table(f"Trie of {sids:,} random SIDs, {levels} levels of {codes} codes", figures))
    if decoded_sids:
        cost = measure_constraint(random_sids(decoded_sids, levels, codes), levels, codes, beams, rounds)
        console.print(figures_table(f"Decoding over {decoded_sids:,} SIDs, stand-in decoder", cost))
        figures += cost
    return figures


def random_sids(count: int, levels: int, codes: int) -> NDArray[np.int32]:
    """Return (N, L) random tokens."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, codes, (count, levels), np.int32) + np.arange(levels, dtype=np.int32) * codes).astype(
        np.int32
    )


def measure_build(sids_NL: NDArray[np.int32], rounds: int) -> list[Figure]:
    """Measure building, size on disk, opening and verifying."""
    build_trie(sids_NL[:2])  # compile
    started = perf_counter()
    trie, _ = build_trie(sids_NL)
    build_seconds = perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="rhumb-bench-") as name:
        folder = Path(name)
        save_trie(trie, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        open_seconds = medians_of({"open": lambda: open_trie(folder)}, rounds, "opening")["open"]
        started = perf_counter()
        verify_trie(open_trie(folder), int(sids_NL.max()) + 1)
        verify_seconds = perf_counter() - started
    return [
        Figure("build", build_seconds, "s", SECONDS_GOAL * len(sids_NL) / 10_000_000),
        Figure("nodes", trie.nodes, ""),
        Figure("files per SID", size / len(sids_NL), "B", BYTES_GOAL),
        Figure("open by memory map", 1e3 * open_seconds, "ms", OPEN_GOAL),
        Figure("verify every node", verify_seconds, "s"),
    ]


def measure_constraint(
    sids_NL: NDArray[np.int32], levels: int, codes: int, beams: tuple[int, ...], rounds: int
) -> list[Figure]:
    """Compare a walk of the trie with a beam search over whole levels, behind the same decoder."""
    trie, _ = build_trie(sids_NL)
    tables = decoder_tables(trie, levels, codes)
    decoder = StandInDecoder(EMBEDDING_DIMENSIONS)
    figures = []
    for width in beams:
        steps = _constrained(tables, decoder, width)
        seconds = medians_of(_ways(tables, decoder, width, steps), rounds, f"beam {width}")
        free, bound, equal = seconds["unconstrained"], seconds["constrained"], seconds["unconstrained, equal steps"]
        figures += [
            Figure(f"unconstrained decoding, beam {width}, {levels} steps", 1e3 * free, "ms"),
            Figure(f"constrained decoding, beam {width}, {steps} steps", 1e3 * bound, "ms"),
            Figure(f"constrained / unconstrained, beam {width}", bound / free, "x", CONSTRAINT_GOAL),
            Figure(f"the same over {steps} steps each, beam {width}", bound / equal, "x", CONSTRAINT_GOAL),
        ]
    return figures


def _ways(tables: WalkTables, decoder: StandInDecoder, width: int, steps: int) -> dict[str, Callable[[], object]]:
    """Return the ways to decode one query: with the trie, without it, and without it for as many steps as with it."""

    def unconstrained(level_offsets: tuple[int, ...]) -> object:
        return decode_unconstrained(decoder.start(), 1, tables.tokens_TE, tables.token_scale_T, level_offsets, width)

    return {
        "constrained": lambda: _constrained(tables, decoder, width),
        "unconstrained": lambda: unconstrained(tables.level_offsets),
        "unconstrained, equal steps": lambda: unconstrained(tables.level_offsets[: steps + 1]),
    }


def decoder_tables(trie: Trie, levels: int, codes: int) -> WalkTables:
    """Return tables for `generative` walks with random token embeddings; nothing in them knows geometry."""
    rng = np.random.default_rng(1)
    tokens = levels * codes
    tokens_TE = rng.standard_normal((tokens + 1, EMBEDDING_DIMENSIONS)).astype(np.float32)
    tokens_TE /= np.linalg.norm(tokens_TE, axis=1, keepdims=True)
    return WalkTables(
        trie=trie,
        vectors=np.zeros((trie.documents, 1), np.float32),
        regions=Regions.none(trie.nodes, 1),
        level_offsets=tuple(range(0, tokens + 1, codes)),
        tokens_TE=tokens_TE,
        token_scale_T=np.full(tokens, 20, np.float32),
    )


def _constrained(tables: WalkTables, decoder: StandInDecoder, beam_width: int) -> int:
    """Walk once; returns the decoder steps."""
    query = np.zeros((1, 1), np.float32)
    return walk(tables, "generative", "constrained", beam_width, query, decoder.start()).steps
