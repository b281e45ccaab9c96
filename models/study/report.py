"""The study as a page: a table for each data set and group, the claims, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from models.study.claims import BEAM, CLAIMS, Claim, Finding, find, spread
from models.study.plan import Plan, places

SHOWN = (
    ("p_unique", "p_unique"), ("cosine", "cosine"), ("Gini, level 1", "gini.1"), ("level 2", "gini.2"),
    ("length", "mean_length"), ("steps", "steps"), ("generative R@1", "generative.R@1"), ("R@10", "generative.R@10"),
    ("MRR@10", "generative.MRR@10"), ("fused R@1", "fused.R@1"), ("R@10", "fused.R@10"), ("MRR@10", "fused.MRR@10"),
    ("geometric R@1", "geometric.R@1"), ("R@10", "geometric.R@10"), ("MRR@10", "geometric.MRR@10"),
    ("guided R@1", "guided.R@1"), ("R@10", "guided.R@10"), ("MRR@10", "guided.MRR@10"),
)  # fmt: skip
DEEP = (
    ("R@1, leaves sampled", "sampled.R@1"),
    ("R@1, first code given", "given.R@1"), ("not given", "same.R@1"), ("Hallu", "invalid"), ("Ret-Per", "retrieved"),
    ("R at a 40th of the corpus", "recall.first"), ("a 20th", "recall.second"), ("a 10th", "recall.deepest"),
    ("head", "head.deepest"), ("tail", "tail.deepest"),
    ("head R@10", "head.R@10"), ("tail R@10", "tail.R@10"),
    ("R@1 under head codes of level 2", "head code.R@1"), ("tail codes", "tail code.R@1"),
)  # fmt: skip
INVALID = "Share of IDs that no document has, among the first so many beams of decoding without the trie, and with it."
BASELINES = ("BM25", "dense, bundle")


def write_report(plan: Plan, results: Mapping[str, Any], path: Path, command: str) -> None:
    """Write the page and, beside it, the picture."""
    picture = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*_head(plan, results, command), "", *_claims(results), ""]
    for data, cells in results.items():
        lines += [f"## {data}", "", *_baselines(cells), ""]
        for group in dict.fromkeys(cell.group for cell in plan.cell):
            names = [cell.name for cell in plan.cell if cell.group == group and cell.name in cells]
            if names:
                lines += [f"### {group}", "", *_table(cells, names, SHOWN), "", *_table(cells, names, DEEP), ""]
        names = [cell.name for cell in plan.cell if cell.name in cells]
        lines += ["### Popularity", "", *_popularity(cells, names), ""]
        invalid = tuple((f"beam {beam}", f"invalid.{beam}") for beam in plan.beams)
        lines += [
            "### Invalid IDs",
            "",
            INVALID,
            "",
            *_table(cells, names, (*invalid, ("with the trie", "made-up"))),
            "",
        ]
    if results:
        plot(results, picture)
        lines += [f"![R@10 of every system]({picture.name})", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _head(plan: Plan, results: Mapping[str, Any], command: str) -> Iterator[str]:
    done = sum(len(seeds) for cells in results.values() for seeds in cells.values())
    yield "# Identifier systems side by side"
    yield ""
    yield f"Made by `{command}`: {done} of {len(list(places(plan)))} trainings are done{_made(results)}."
    yield "Queries are a sample of the test split, the same for all; parts are measured where they are not empty."
    yield f"All cells of a data set share one tuned encoder, frozen; models are measured in {plan.precision}. Means"
    yield f"over seeds ± the deviation of one; retrieval lexicographic at beam {BEAM}, deep measures at beam"
    yield f"{max(plan.beams)}; `fused` ranks what a generative walk found by log P + weight · cosine. A gap is `within"
    yield "noise` if it is less than one deviation, over seeds and over test queries. A reproduction: sizes are a"
    yield "hundredth of the papers'."


def _made(results: Mapping[str, Any]) -> str:
    """Say by what, with a warning where one table has figures of several versions."""
    made = [result["made"] for cells in results.values() for seeds in cells.values() for result in seeds.values()]
    devices = sorted({made_by["device"] for made_by in made})
    versions = len({tuple(sorted(made_by.items())) for made_by in made})
    mixed = f", by {versions} versions of the code or its libraries" if versions > 1 else ""
    return f" on {' and '.join(devices)}{mixed}" if made else ""


def _claims(results: Mapping[str, Any]) -> Iterator[str]:
    """A row a claim, a column a data set: the two figures and whether their signs agree."""
    yield "## Claims"
    yield ""
    yield "| claim | compared | paper | " + " | ".join(results) + " |"
    yield "| --- | --- | --- | " + " | ".join("---" for _ in results) + " |"
    for claim in CLAIMS:
        verdicts = {found.data: found for found in find([claim], results)}
        if verdicts:
            cells = " | ".join(_verdict(verdicts[data]) if data in verdicts else "" for data in results)
            yield f"| {claim.text} | {_compared(claim)} | {claim.paper} | {cells} |"


def _compared(claim: Claim) -> str:
    if claim.against:
        return f"{claim.left}: {claim.metric} / {claim.against}"
    allowed = f", at most {claim.margin:g} behind" if claim.margin else ""
    return f"{claim.left} / {claim.right}: {claim.metric}{allowed}"


def _verdict(found: Finding) -> str:
    sides = [(mean, deviation if found.seeds > 1 else None) for mean, deviation in (found.left, found.right)]
    return " / ".join(_shown(*side) for side in sides) + f", **{found.verdict}**"


def _baselines(cells: Mapping[str, Any]) -> Iterator[str]:
    """Baselines are the same for all cells that leave the encoder alone: take the first."""
    first = next(iter(next(iter(cells.values())).values()))
    yield f"{first['documents']:,} documents, {first['queries']:,} test queries."
    yield ""
    yield "| baseline | R@1 | R@10 | R@100 | MRR@10 |"
    yield "| --- | --- | --- | --- | --- |"
    for row in first["rows"]:
        if row["system"] in BASELINES:
            values = " | ".join(f"{row['measures'][name]:.3f}" for name in ("R@1", "R@10", "R@100", "MRR@10"))
            yield f"| {row['system']} | {values} |"


def _table(cells: Mapping[str, Any], names: list[str], columns: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield "| system | seeds | " + " | ".join(title for title, _ in columns) + " |"
    yield "| --- | --- | " + " | ".join("---" for _ in columns) + " |"
    for name in names:
        yield f"| {name} | {len(cells[name])} | " + " | ".join(_cell(cells[name], m) for _, m in columns) + " |"


def _popularity(cells: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """Hits of generative walks by how often train queries ask for the document; the buckets are the same for all."""
    first = [found for found in (_buckets(cells[name]) for name in names) if found]
    if not first:
        return
    yield "Hits in the first ten, generative, by how often train queries ask for the document; equal shares of them."
    yield ""
    titles = [f"{b['least']} to {b['most']} ({b['queries']:,} queries)" for b in first[0][0]]
    yield "| system | " + " | ".join(titles) + " |"
    yield "| --- | " + " | ".join("---" for _ in titles) + " |"
    for name in names:
        if seeds := _buckets(cells[name]):
            rates = [[b["hits"] / b["queries"] for b in same if b["queries"]] for same in zip(*seeds, strict=True)]
            yield f"| {name} | " + " | ".join(f"{fmean(found):.3f}" if found else "" for found in rates) + " |"


def _buckets(seeds: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    return [result["deep"]["generative"]["buckets"] for result in seeds.values() if "generative" in result["deep"]]


def _cell(seeds: Mapping[str, Any], metric: str) -> str:
    found = spread(seeds, metric)
    return "" if found is None else _shown(found[0], found[1] if len(seeds) > 1 else None)


def _shown(mean: float, deviation: float | None) -> str:
    digits = 1 if mean >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw R@10 of every cell by scoring, a panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 6), squeeze=False)
    for panel, (data, cells) in zip(panels[0], results.items(), strict=True):
        names = list(cells)
        for scoring, marker in (("generative", "o"), ("geometric", "s"), ("guided", "^")):
            points = [(spread(cells[name], f"{scoring}.R@10"), row) for row, name in enumerate(names)]
            known = [(found, row) for found, row in points if found]
            panel.errorbar(
                [found[0] for found, _ in known], [row for _, row in known], xerr=[found[1] for found, _ in known],
                fmt=marker, label=scoring, capsize=2,
            )  # fmt: skip
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_title(data)
        panel.set_xlabel(f"R@10 at beam {BEAM}")
        panel.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3)  # a panel is full of points
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
