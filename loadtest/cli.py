"""Commands of the measuring half: `rhumb bench trie | search | hamming`.

Light at import: whatever needs numba or onnxruntime is imported inside the command.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    name="bench", help="Measure this machine, with the goal next to each figure.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add `bench` and its commands to the application."""
    app.add_typer(bench_app)


@bench_app.command("trie")
def bench_trie(
    sids: Annotated[int, typer.Option(min=0, help="Random SIDs to build a trie of; 0 skips.")] = 10_000_000,
    levels: Annotated[int, typer.Option(min=1, max=64, help="Levels of a SID.")] = 5,
    codes: Annotated[int, typer.Option(min=2, help="Codes of a level.")] = 256,
    decoded_sids: Annotated[int, typer.Option(min=0, help="SIDs for the cost of the constraint; 0 skips.")] = 1_000_000,
    beam: Annotated[list[int] | None, typer.Option(min=1, max=1000, help="Beam widths; 10, 50 and 100.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 50,
) -> None:
    """Build, size and opening of the trie, and what its constraint costs a decoder."""
    _one_core()
    from loadtest.bench.trie import run

    run(sids, levels, codes, decoded_sids, tuple(beam or (10, 50, 100)), rounds)


@bench_app.command("search")
def bench_search(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    queries: Annotated[Path | None, typer.Option(help="One query per line; else the bundle's own titles.")] = None,
    beam: Annotated[list[int] | None, typer.Option(min=1, max=1000, help="Beam widths; 10, 50 and 100.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use so many queries.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="onnxruntime threads.")] = 1,
) -> None:
    """Where a query's time goes, what the constraint costs, and what HTTP adds."""
    _one_core()
    from loadtest.bench.search import run

    run(bundle, queries, tuple(beam or (10, 50, 100)), limit, threads)


@bench_app.command("hamming")
def bench_hamming(
    size: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of documents; 10^4 to 10^7.")] = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Words of a code; 12, 20, 24 and 36.")] = None,
    quick: Annotated[bool, typer.Option(help="Seconds instead of minutes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file.")] = None,
) -> None:
    """Hamming search over packed codes beside its peers and the machine's limits."""
    from loadtest.bench.hamming import run

    run(size, width, quick, plot)


def _one_core() -> None:
    """Keep numpy's matrix products on one core: its threads spin, and disturb whatever is timed beside them.

    Works as long as numpy has not been imported, which is what light imports are for.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
