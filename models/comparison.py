"""One table of systems side by side: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from models.measures import MEASURES


@dataclass(frozen=True)
class Row:
    """One system on one split.

    Attributes:
        system: "BM25", "dense, bundle", "dense, untuned", "Hamming", "walk", "lexical" or "hybrid".
        measures: every name of `MEASURES`, 0 to 1.
        scoring, ranking: of a walk; of a Hamming search the level, and by what its results are ordered; of a hybrid
            search its walk's scoring.
        beam: beam width of a walk.
        milliseconds: of a query within a batch: encode, decode, walk and rank (baselines: their search, BM25 with its
            indexing). A ranking that reorders the walk of the row above has none, nor what follows.
        valid_trie: share of returned SIDs that exist in the index.
        valid_free: the same for the first `beam` SIDs that the decoder writes without the trie.
        steps: of the decoder for a query, on average.
    """

    system: str
    measures: dict[str, float]
    scoring: str = ""
    ranking: str = ""
    beam: int | None = None
    milliseconds: float | None = None
    valid_trie: float | None = None
    valid_free: float | None = None
    steps: float | None = None

    @property
    def name(self) -> str:
        """A name for files: what the row is, without spaces."""
        parts = [self.system.replace(", ", "-"), self.scoring, self.ranking, f"beam{self.beam}" if self.beam else ""]
        return "-".join(part for part in parts if part).lower()


@dataclass(frozen=True)
class CascadeRow:
    """A prefix cascade over packed codes: which part of the scan's ten nearest it finds.

    Attributes:
        level: of the codes.
        dims: dimensions of the prefix that is compared first.
        words, all_words: words of that prefix and of a whole code.
        share: part of the documents that is compared whole.
        recall: of the ten nearest by whole codes, averaged over queries.
    """

    level: str
    dims: int
    words: int
    all_words: int
    share: float
    recall: float

    @property
    def cells(self) -> list[str]:
        """As text, in the order of `CASCADE_COLUMNS`."""
        return [
            self.level,
            str(self.dims),
            f"{self.words} of {self.all_words}",
            f"{self.share:.0%}",
            f"{self.recall:.3f}",
        ]


@dataclass(frozen=True)
class Comparison:
    """All rows of one run of `rhumb evaluate`, with what they were measured on."""

    bundle: str
    digest: str
    data: str
    split: str
    documents: int
    queries: int
    free_queries: int
    seen: int = 0  # queries that stand in train with a document of theirs
    rows: list[Row] = field(default_factory=list)
    cascades: list[CascadeRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        title = f"{self.data} {self.split}: {self.queries:,} queries, {self.documents:,} documents"
        known = (
            f"{self.seen} {'query stands' if self.seen == 1 else 'queries stand'} in train with a document of theirs"
        )
        return f"{title}; {known}" if self.seen else title

    def as_table(self) -> Table:
        """Give a table for the terminal."""
        table = Table(title=self.title)
        for number, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*cells(row))
        return table

    def cascades_as_table(self) -> Table:
        """Give a table of what cascades over the packed codes find."""
        table = Table(title="prefix cascades: share of the ten nearest by whole codes")
        for name in CASCADE_COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.cascades:
            table.add_row(*row.cells)
        return table

    def as_markdown(self) -> str:
        """Give Markdown tables, the first under its title."""
        lines = [COLUMNS, ["---"] * 3 + ["---:"] * (len(COLUMNS) - 3), *(cells(row) for row in self.rows)]
        text = f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        if not self.cascades:
            return text
        lines = [CASCADE_COLUMNS, ["---:"] * len(CASCADE_COLUMNS), *(row.cells for row in self.cascades)]
        return text + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write_json(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


CASCADE_COLUMNS = ["level", "first dims", "words", "documents kept", "recall"]
COLUMNS = ["system", "scoring", "ranking", "beam", *MEASURES, "ms", "valid", "valid free"]


def cells(row: Row) -> list[str]:
    """Give the cells of a row in the order of `COLUMNS`; what does not apply is empty."""
    measures = [f"{row.measures[name]:.3f}" for name in MEASURES]
    beam = "" if row.beam is None else str(row.beam)
    milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.1f}"
    shares = ["" if share is None else f"{share:.3f}" for share in (row.valid_trie, row.valid_free)]
    return [row.system, row.scoring, row.ranking, beam, *measures, milliseconds, *shares]
