"""Commands of the offline half: `rhumb train`, `evaluate`, `report`, `quantize`, `study`.

Light at import: torch and everything that needs it is imported inside the command, so that `rhumb --help` stays quick
and a service without the extra [train] still starts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(report)
    app.command()(quantize)
    app.command()(study)


def train(
    data: Annotated[
        list[Path], typer.Argument(help="Folders in the BEIR layout: corpus.jsonl, queries.jsonl, qrels/.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, and the models at the end.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe that is shipped, or a TOML file.")] = "combined",
    encoder: Annotated[str, typer.Option(help="Hugging Face encoder, by name or local folder.")] = "",
    model: Annotated[Path | None, typer.Option(help="Model that an adapter (recipe qama) is trained for.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int | None, typer.Option(min=0, max=(1 << 63) - 1, help="Instead of the recipe's.")] = None,
    history: Annotated[
        int | None, typer.Option(min=0, max=1000, help="Earlier items of a query to use, instead of the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was cut off.")] = True,
) -> None:
    """Train a model on folders of documents and queries, or with the recipe qama an adapter for binary codes."""
    with plain_errors():
        from models.data import vectors_file
        from models.retriever.recipe import load_recipe, read_table
        from models.retriever.train import run

        if "quantisation" in read_table(recipe)[1]:
            _refuse_for_adapter({"--encoder": encoder, "--device": device != "cpu", "--history": history is not None})
            _train_adapter(data, out, recipe, model, resume, seed)
            return
        if model is not None:
            raise typer.BadParameter(
                f"--model is for recipes of adapters (qama), {recipe!r} trains a model of its own: leave it out, or "
                "give --encoder"
            )
        chosen = load_recipe(recipe)
        if encoder:
            chosen = chosen.model_copy(update={"encoder": chosen.encoder.model_copy(update={"name": encoder})})
        if seed is not None:
            chosen = chosen.model_copy(update={"seed": seed})
        if history is not None:
            chosen = chosen.model_copy(update={"text": chosen.text.model_copy(update={"history_count": history})})
        run(chosen, data, out, device, resume)
    corpus = data[0] if len(data) == 1 else Path("DATA")
    vectors = vectors_file(out, corpus)
    typer.echo(
        f"next: rhumb index --model {out / 'model-int8'} --corpus {corpus} --vectors {vectors} --out {out / 'bundle'}"
    )


def _refuse_for_adapter(given: dict[str, str | bool]) -> None:
    """Refuse by name the options of `train` that mean nothing to an adapter's recipe."""
    remedies = {
        "--encoder": "give --model, whose encoder makes the vectors, or data with vectors of your encoder",
        "--device": "leave it out: an adapter is trained on the CPU",
        "--history": "leave it out: an adapter learns from queries as they are, without earlier items",
    }
    for option, value in given.items():
        if value:
            raise typer.BadParameter(f"{option} is not for recipes of adapters (qama): {remedies[option]}")


def _train_adapter(
    data: list[Path], out: Path, recipe: str, model: Path | None, resume: bool, seed: int | None
) -> None:
    from models.qama.train import run

    Console().print(str(run(recipe, data, out, resume, model=model, seed=seed)))


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    data: Annotated[Path, typer.Option(help="Folder in the BEIR layout.")],
    split: Annotated[str, typer.Option(help="Name of the file in qrels/.")] = "test",
    scoring: Annotated[list[str] | None, typer.Option(help="Of the walk; all that the bundle offers.")] = None,
    ranking: Annotated[list[str] | None, typer.Option(help="Of the candidates; all but sampled.")] = None,
    beam: Annotated[list[int] | None, typer.Option(help="Beam widths; 10, 20, 50 and 100.")] = None,
    baselines: Annotated[bool, typer.Option(help="BM25 and exact search beside the walk.")] = True,
    codes: Annotated[bool, typer.Option(help="Hamming searches, where the bundle has packed codes.")] = True,
    untuned: Annotated[Path | None, typer.Option(help="Another encoder: a model, or docs.npy with ids.")] = None,
    free_queries: Annotated[int, typer.Option(help="Queries that are also decoded without the trie.")] = 500,
    batch: Annotated[int, typer.Option(help="Queries of a call.")] = 32,
    limit: Annotated[int, typer.Option(help="Only so many queries, a sample; 0 for all.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of the pipeline.")] = 1,
    runs: Annotated[Path | None, typer.Option(help="Folder for TREC runs, one file a row.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Measure a bundle on judged queries, beside BM25 and exact search, in one table."""
    with plain_errors():
        from models.evaluate import evaluate as run
        from models.task import BEAMS, RANKINGS, Settings

        settings = Settings(
            split=split,
            scorings=tuple(scoring or ()),
            rankings=tuple(ranking or RANKINGS),
            beams=tuple(beam or BEAMS),
            baselines=baselines,
            codes=codes,
            untuned=untuned,
            free_queries=free_queries,
            batch=batch,
            limit=limit,
            threads=threads,
            runs=runs,
        )
        found = run(bundle, data, settings)
        _console().print(found.as_table())
        if found.cascades:
            _console().print(found.cascades_as_table())
        if json is not None:
            found.write_json(json)
        if markdown is not None:
            markdown.write_text(found.as_markdown(), encoding="utf-8")


def report(
    sids: Annotated[Path, typer.Argument(help="A bundle, or a .npy array (documents, levels) of codes.")],
    interactions: Annotated[Path | None, typer.Option(help="corpus-id <tab> count, for head and tail.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Document ids of a .npy array, one a line.")] = None,
    level_sizes: Annotated[str, typer.Option(help="Of a .npy array, e.g. 128,128,128.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG.")] = None,
) -> None:
    """Report the quality of semantic IDs: uniqueness, collisions, and how each level uses its codes."""
    with plain_errors():
        from models.data import read_interactions
        from models.quantizers.report import load_sids, plot_report, print_report, report_sids, write_json

        found = load_sids(sids, _sizes(level_sizes), ids)
        counts = None if interactions is None else read_interactions(interactions, dict.fromkeys(found.named()))
        quality = report_sids(found, counts)
        print_report(found.name, quality, _console())
        if json is not None:
            write_json(found.name, quality, json)
        if plot is not None:
            plot_report(found.name, quality, plot)


def quantize(
    vectors: Annotated[list[Path], typer.Argument(help=".npy arrays (documents, dimensions) of vectors.")],
    system: Annotated[
        list[str] | None, typer.Option(help="Quantizers to compare; hhq, hhq_paper and rq_kmeans.")
    ] = None,
    codes: Annotated[list[int] | None, typer.Option(min=2, help="Codes of a level; 128 and 256.")] = None,
    levels: Annotated[list[int] | None, typer.Option(min=1, help="Codes of a semantic ID; 4.")] = None,
    dims: Annotated[list[int] | None, typer.Option(min=1, help="Keep so many principal dimensions; all.")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=(1 << 63) - 1, help="Of every random choice; several give deviations; 0."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG by depth.")] = None,
) -> None:
    """Compare quantizers on your vectors at equal size: unique IDs, cosine, and how evenly codes are used."""
    with plain_errors():
        from models.quantizers import compare as quantizers

        sizes = codes or [128, 256], levels or [4], seed or [0], dims or []
        rows = [row for path in vectors for row in quantizers.compare(path, system or quantizers.SHOWN, *sizes)]
        _console().print(quantizers.as_table(rows))
        if markdown is not None:
            markdown.write_text(quantizers.as_markdown(rows), encoding="utf-8")
        if plot is not None:
            quantizers.plot(rows, plot)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let a file that cannot be read or written be a message like every other mistake that the user can mend."""
    from models.lines import DataError

    try:
        yield
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise DataError(f"{named}{error.strerror or error}") from error


def study(
    out: Annotated[Path, typer.Option(help="Folder of the study: what is done there is not done again.")],
    data: Annotated[Path | None, typer.Option(help="Folder that holds the plan's data sets.")] = None,
    encoder: Annotated[str, typer.Option(help="Hugging Face encoder that all cells start from.")] = "",
    plan: Annotated[Path | None, typer.Option(help="Another plan; models/study/plan.toml is the shipped one.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Markdown page to write; its picture and PAGE-figures/ go beside it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny study of made-up data that takes minutes.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Only the cells of this data set; several allowed.")] = None,
) -> None:
    """Train and measure every identifier system of the papers, and write one page with all of them."""
    with plain_errors():
        from models.study.plan import QUICK, SHIPPED, load_plan
        from models.study.quick import write_quick
        from models.study.report import write_report
        from models.study.runner import run_study

        if quick and (data is not None or encoder):
            raise typer.BadParameter("a --quick study makes its own data and encoder: leave --data and --encoder out")
        if quick:
            data, encoder = write_quick(out)
        if data is None or not encoder:
            raise typer.BadParameter("--data and --encoder are needed, unless the study is --quick")
        chosen = load_plan(plan or (QUICK if quick else SHIPPED))
        page = report or out / "systems.md"
        given = ["--quick"] if quick else ["--data DATA --encoder ENCODER"]
        given += ["--plan PLAN"] if plan else []
        given += ["--report PAGE"] if report else []
        command = f"make results ARGS='{' '.join(given)}'"
        run_study(
            chosen, data, encoder, out / "cells", page.with_name(f"{page.stem}-figures"), device, only or (),
            after=lambda results: write_report(chosen, results, page, command),
        )  # fmt: skip
    Console().print(str(page))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"--level-sizes is {text!r}: give whole numbers with commas, e.g. 128,128,128"
        ) from None


def _console() -> Console:
    """A console on stdout that never breaks table rows when it writes into a file."""
    return Console() if sys.stdout.isatty() else Console(width=200)
