"""Interleaved timing, and a table that puts the goal next to each figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from rich.table import Table

from service.ops.progress import progress_bar


def medians_of(
    contenders: Mapping[str, Callable[[], object]], rounds: int, what: str = "measuring"
) -> dict[str, float]:
    """Run every contender once to warm up, then `rounds` times in turns; returns median seconds by name.

    Turns keep a machine that slows down from favouring whoever came first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress_bar(what, rounds + 1) as advance:
        for turn in range(rounds + 1):
            for name, run in contenders.items():
                started = perf_counter()
                run()
                if turn:
                    seconds[name].append(perf_counter() - started)
            advance(1)
    return {name: median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: behind the figure.
        goal: the largest value that meets the goal; None where there is none.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the goal is met; figures without a goal are."""
        return self.goal is None or self.value <= self.goal


def figures_table(title: str, figures: Sequence[Figure]) -> Table:
    """Return a table of figures with their goals."""
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("")
    for figure in figures:
        goal = "" if figure.goal is None else f"at most {figure.goal:,.4g} {figure.unit}"
        met = "" if figure.goal is None else "[green]met[/]" if figure.is_met else "[red]missed[/]"
        table.add_row(figure.name, f"{figure.value:,.4g} {figure.unit}", goal, met)
    return table
