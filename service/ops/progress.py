"""Progress on stderr for whatever takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(what: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr and give the function that advances it by so many units.

    Args:
        what: what is being done, in a word or two.
        total: units to do; None when unknown (the bar pulses and counts).
        quiet: show nothing; the function does nothing.
    """
    if quiet:
        yield lambda _units: None
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda units: progress.advance(task, units)
