"""What `rhumb bench hamming` found: ratios, goals, table, plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

PEERS: dict[str, tuple[str, ...]] = {  # a peer's time is that of its quickest variant
    "faiss": ("faiss heap", "faiss count"),
    "numpy": ("numpy",),
    "usearch": ("usearch",),
    "FP32": ("fp32 plain", "fp32 blas"),
}


@dataclass(frozen=True)
class Cell:
    """One workload's medians.

    Attributes:
        documents: N.
        words: W.
        queries: Q.
        k: results a query.
        seconds: median seconds for all queries, by contender.
        read_bandwidth: bytes a second, measured between the runs.
        popcount_peak: bytes a second, measured between the runs.
    """

    documents: int
    words: int
    queries: int
    k: int
    seconds: dict[str, float]
    read_bandwidth: float
    popcount_peak: float

    @property
    def ours(self) -> float:
        """Seconds of our scan on one core."""
        return self.seconds["rhumb"]

    @property
    def rate(self) -> float:
        """Bytes of codes that one core compares a second."""
        return self.documents * self.words * 8 * self.queries / self.ours

    def peer(self, name: str) -> float | None:
        """Seconds of a peer's quickest variant, None where it did not run."""
        return min((self.seconds[variant] for variant in PEERS[name] if variant in self.seconds), default=None)

    def times(self, name: str) -> float | None:
        """How many times longer a peer takes."""
        seconds = self.peer(name)
        return None if seconds is None else seconds / self.ours

    @property
    def two_cores(self) -> float | None:
        """How many times quicker two cores are than one."""
        return self.ours / self.seconds["rhumb x2"] if "rhumb x2" in self.seconds else None


@dataclass(frozen=True)
class Goal:
    """A figure to reach at a million documents (or the largest size below)."""

    name: str
    least: float
    applies: Callable[[Cell], bool]
    value: Callable[[Cell], float | None]


def _times(peer: str) -> Callable[[Cell], float | None]:
    return lambda cell: cell.times(peer)


GOAL_SIZE = 1_000_000  # documents
GOALS = (
    Goal("times faster than faiss, 1 query", 1.05, lambda c: c.queries == 1, _times("faiss")),
    Goal("times faster than faiss, 32 queries", 7.0, lambda c: c.queries == 32, _times("faiss")),
    Goal("times faster than faiss, 1,000 queries", 7.0, lambda c: c.queries == 1000, _times("faiss")),
    Goal("times faster than numpy, 1 query", 10.0, lambda c: c.queries == 1, _times("numpy")),
    Goal("times faster than numpy, batches", 10.0, lambda c: c.queries >= 32, _times("numpy")),
    Goal("times faster than FP32 flat, 1 bit", 30.0, lambda c: c.words == 12, _times("FP32")),
    Goal("of read bandwidth, 1 query", 0.85, lambda c: c.queries == 1, lambda c: c.rate / c.read_bandwidth),
    Goal("of popcount peak, batches", 0.7, lambda c: c.queries >= 32, lambda c: c.rate / c.popcount_peak),
    Goal("times faster on two cores", 1.7, lambda _: True, lambda c: c.two_cores),
)


def _format(value: float | None, unit: str = "x") -> str:
    return "-" if value is None else f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}"


def cells_table(cells: Iterable[Cell]) -> Table:
    """Every workload: our time and share of the limits, then how many times longer each peer takes."""
    table = Table(title="Hamming search: medians; peers as multiples of ours on one core")
    for name in ("N", "W", "Q", "k", "ms", "GB/s", "of read", "of popcount", "2 cores", *PEERS):
        table.add_column(name, justify="right")
    for cell in cells:
        limits = (cell.rate / cell.read_bandwidth, cell.rate / cell.popcount_peak)
        table.add_row(
            f"{cell.documents:,}", str(cell.words), f"{cell.queries:,}", str(cell.k), f"{cell.ours * 1e3:.3f}",
            f"{cell.rate / 1e9:.0f}", *(_format(share, "") for share in limits), _format(cell.two_cores),
            *(_format(cell.times(peer)) for peer in PEERS),
        )  # fmt: skip
    return table


def goals_table(cells: Sequence[Cell]) -> Table:
    """The goals beside the worst and the best measured, at the largest size up to a million, or the smallest beyond."""
    sizes = sorted({cell.documents for cell in cells})
    size = max((size for size in sizes if size <= GOAL_SIZE), default=sizes[0])
    table = Table(title=f"Goals at {size:,} documents")
    for name in ("goal", "at least", "worst", "best", ""):
        table.add_column(name, justify="left" if name == "goal" else "right")
    for goal in GOALS:
        values = [goal.value(c) for c in cells if c.documents == size and goal.applies(c)]
        measured = [value for value in values if value is not None]
        if measured:
            verdict = "met" if min(measured) >= goal.least else "missed"
            table.add_row(goal.name, f"{goal.least}", _format(min(measured), ""), _format(max(measured), ""), verdict)
        else:
            table.add_row(goal.name, f"{goal.least}", "-", "-", "not run")
    return table


def plot_cells(cells: Sequence[Cell], path: Path) -> None:
    """Draw milliseconds a query by width, one panel for each number of queries, at the largest size up to a million."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display needed
    from matplotlib import pyplot

    size = max(c.documents for c in cells if c.documents <= 1_000_000 or c.documents == cells[0].documents)
    k = min(c.k for c in cells)
    drawn = [c for c in cells if c.documents == size and c.k == k]
    panels = sorted({c.queries for c in drawn})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, queries in zip(axes[0], panels, strict=True):
        _draw_panel(axis, [c for c in drawn if c.queries == queries])
    axes[0][0].set_ylabel("milliseconds a query (log)")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"Exact Hamming search, {size:,} documents, k = {k}, one core")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_panel(axis: object, cells: Sequence[Cell]) -> None:
    """Grouped bars: ours and the peers, with the machine's limit as a line over each group."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)  # noqa: S101 (matplotlib is imported late, its type with it)
    names = ("rhumb", *PEERS)
    for i, name in enumerate(names):
        seconds = [c.ours if name == "rhumb" else c.peer(name) for c in cells]
        heights = [1e3 * s / c.queries if s else 0 for s, c in zip(seconds, cells, strict=True)]
        axis.bar([x + 0.16 * i for x in range(len(cells))], heights, 0.15, label=name)
    for x, cell in enumerate(cells):
        limit = cell.read_bandwidth if cell.queries == 1 else cell.popcount_peak
        milliseconds = 1e3 * cell.documents * cell.words * 8 / limit
        axis.hlines(milliseconds, x - 0.1, x + 0.74, colors="black", linestyles="dashed", linewidth=1)
    axis.set_yscale("log")
    axis.set_xticks([x + 0.32 for x in range(len(cells))], [f"{c.words} words" for c in cells])
    axis.set_title(
        f"{cells[0].queries:,} quer{'y' if cells[0].queries == 1 else 'ies'} (dashed: the limit)", fontsize=9
    )
