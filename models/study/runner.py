"""Runs a study: every cell is trained, indexed and measured once, and its figures are kept.

    out/DATA/encoder/             the tuned encoder that the cells of a data set share, and its vectors of the documents
    out/DATA/CELL/SEED/           a training that is under way; deleted when its figures are there
    figures/DATA/CELL/SEED.json   the figures, with the fingerprint of what they were measured on

A cell that is cut off goes on from its last epoch. Figures are small: kept with the page that is made of them, they let
a study go on where nothing else of it is left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from models.data import SEQUENCES, DataError, Dataset, load_dataset
from models.evaluate import Walk, evaluate
from models.lines import lines
from models.measures import measure
from models.measures_deep import head_documents, measure_deep, scaled_depths, split_qrels
from models.popularity import hits_by_popularity
from models.quantizers.quality import HEAD_SHARE
from models.quantizers.report import load_sids, report_sids
from models.retriever.recipe import Recipe
from models.retriever.shelf import Shelf
from models.retriever.train import train, train_splits
from models.study.claims import BEAM
from models.study.given import measure_given_first
from models.study.plan import Place, Plan, cell_recipe, encoder_recipe, places
from models.study.prints import cell_print, encoder_print
from models.task import Settings, Task, first_queries, make_encoder, make_task
from service.index.arrays import write_array
from service.index.build import build_bundle
from service.index.bundle import open_bundle, open_model
from service.model.text import document_text
from service.search.pipeline import Pipeline

console = Console(stderr=True)
GIVEN_QUERIES = 500  # walks with the first code given are walked one by one
RANKED = ("lexicographic", "fused")  # orders of a walk's candidates that are measured
HIT_DEPTH = 10  # of hits by popularity


class SharedEncoder(NamedTuple):
    """How the encoder that the cells of a data set share is tuned, and the fingerprint of that."""

    recipe: Recipe
    print_: str


class Job(NamedTuple):
    """A place of a plan, what is trained there, and the fingerprints of the model and of its figures."""

    place: Place
    recipe: Recipe
    model: str
    figures: str


def run_study(
    plan: Plan,
    data: Path,
    encoder: str,
    out: Path,
    figures: Path,
    device: str = "cpu",
    only: Collection[str] = (),
    after: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run what is not done yet, one cell after the other.

    Args:
        plan: the cells.
        data: folder that holds the plan's data sets.
        encoder: Hugging Face encoder that all cells start from.
        out: folder of the trainings.
        figures: folder of their figures.
        device: where to train.
        only: run the cells of these data sets, so that several processes can share a plan; empty for all.
        after: is given all results so far at the start and after every cell: a study may be cut off at any time.

    Returns:
        The results by data set, cell and seed.

    Raises:
        DataError: a data set is missing or too small, `only` names one that the plan lacks, or `out` holds an encoder
            that was tuned otherwise.
    """
    if unknown := sorted(set(only) - set(plan.data)):
        raise DataError(f"the plan has no data set {unknown[0]!r}: it has {', '.join(plan.data)}")
    encoders = encoders_of(plan, data, encoder)
    jobs = jobs_of(plan, data, out, encoders)
    for name in only or plan.data:
        check_corpus(data / name, plan)
        check_encoder(encoders[name].print_, tuned_encoder(out, name))
    if absent := sorted(set(plan.data) - {job.place.data for job in jobs}):
        console.print(f"not in {data}, so without their figures: {', '.join(absent)}")
    todo = [job for job in jobs if not only or job.place.data in only]
    shelf = Shelf()
    after(collect(jobs, figures))
    for number, job in enumerate(todo, 1):
        place, folder = job.place, data / job.place.data
        if read_result(job, figures) is None:
            tune_encoder(encoders[place.data], folder, tuned_encoder(out, place.data), device)
            console.rule(f"{number} of {len(todo)}: {place.data}, {place.cell.name}, seed {place.seed}")
            run_cell(job, folder, place.under(out), place.file(figures), plan, device, shelf)
            after(collect(jobs, figures))
    return collect(jobs, figures)


def encoders_of(plan: Plan, data: Path, encoder: str) -> dict[str, SharedEncoder]:
    """Return how the encoder of every data set that is there is tuned; its files and the data are read once."""
    recipes = {
        name: encoder_recipe(plan.encoder, encoder, shared_changes(plan, data / name))
        for name in plan.data
        if (data / name / "corpus.jsonl").is_file()
    }
    return {name: SharedEncoder(recipe, encoder_print(recipe, data / name)) for name, recipe in recipes.items()}


def jobs_of(plan: Plan, data: Path, out: Path, encoders: Mapping[str, SharedEncoder]) -> list[Job]:
    """Return what a plan trains on the data sets that are there."""
    shared = {name: shared_changes(plan, data / name) for name in encoders}
    asked = (plan.queries, plan.precision, *plan.beams, *RANKED)
    jobs = []
    for place in places(plan):
        if place.data in encoders:
            recipe = cell_recipe(place.cell, tuned_encoder(out, place.data), place.seed, shared[place.data])
            tuned = encoders[place.data].print_
            jobs.append(Job(place, recipe, cell_print(recipe, tuned), cell_print(recipe, tuned, asked)))
    return jobs


def check_corpus(folder: Path, plan: Plan) -> None:
    """Refuse a data set that is missing or too small to be measured, before anything is trained."""
    corpus = folder / "corpus.jsonl"
    if not corpus.is_file():
        raise DataError(f"{folder}: no corpus.jsonl there; the plan names the data sets {', '.join(plan.data)}")
    try:
        scaled_depths(sum(1 for _ in lines(corpus)))
    except DataError as error:
        raise DataError(f"{corpus}: {error}") from None


def shared_changes(plan: Plan, folder: Path) -> dict[str, Any]:
    """Changes to every cell of a data set."""
    return plan.common | (plan.history if (folder / SEQUENCES).is_file() else {})


def tuned_encoder(out: Path, data: str) -> Path:
    """Where the encoder is, as a Hugging Face folder, that the cells of a data set share."""
    return out / data / "encoder" / "encoder"


def check_encoder(expected: str, tuned: Path) -> None:
    """Refuse an encoder that was tuned otherwise: the figures beside it rest on it, so it is not replaced."""
    mark = tuned.parent / "fingerprint"
    if tuned.is_dir() and mark.is_file() and mark.read_text() != expected:
        raise DataError(
            f"{tuned} was tuned from another encoder, on other data or by another recipe than this study's, and the "
            f"figures in {tuned.parents[1]} rest on it: choose another --out, or remove that folder"
        )


def tune_encoder(shared: SharedEncoder, folder: Path, tuned: Path, device: str) -> None:
    """Tune a data set's encoder, unless it is tuned."""
    if not (keep_if_same(tuned.parent, shared.print_) and tuned.is_dir()):
        console.rule(f"{folder.name}: tuning the encoder")
        train(shared.recipe, [_load(folder, shared.recipe)], tuned.parent, device)


def run_cell(job: Job, folder: Path, out: Path, figures: Path, plan: Plan, device: str, shelf: Shelf) -> None:
    """Train, index, measure, write the figures down, clear up."""
    recipe = job.recipe
    dataset = _load(folder, recipe)
    keep_if_same(out / "run", job.model)
    model = train(recipe, [dataset], out / "run", device, shelf=shelf)
    frozen = not any(stage.encoder_lr for stage in recipe.stage)
    vectors_ND = document_vectors(model, dataset, recipe) if frozen else None
    served, bundle = (model if plan.precision == "float32" else model.with_name("model-int8")), out / "bundle"
    build_bundle(served, dataset.documents, bundle, vectors=vectors_ND, progress=False, replace=True, lexical=False)
    result = measure_bundle(bundle, folder, plan)
    result["fingerprint"] = job.figures
    figures.parent.mkdir(parents=True, exist_ok=True)
    partial = figures.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(figures)
    shutil.rmtree(out)


def document_vectors(model: Path, dataset: Dataset, recipe: Recipe) -> NDArray[np.float32]:
    """Encode the documents as indexing does, once for all cells that leave the encoder frozen; kept beside it.

    What is kept is named by what it is of: the texts, how much of them the encoder reads, and how it pools.
    """
    read = [document_text(document.title, document.text, recipe.text) for document in dataset.documents]
    of = json.dumps([recipe.text.max_document_tokens, recipe.encoder.pooling, read])
    kept = Path(recipe.encoder.name).parent / f"vectors-{hashlib.sha256(of.encode()).hexdigest()[:16]}.npy"
    if not kept.is_file():
        texts = [(document.title, document.text) for document in dataset.documents]
        partial = kept.with_suffix(".partial.npy")
        write_array(partial, make_encoder(open_model(model), 1).encode_documents(texts))
        partial.replace(kept)
    vectors_ND: NDArray[np.float32] = np.load(kept, allow_pickle=False)
    return vectors_ND


def measure_bundle(path: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """All figures of a bundle: its SIDs, retrieval by every scoring, deep measures, head and tail.

    The widest beam, of which the deep measures are, is walked by the decoder alone: it costs more than all others.
    """
    widest = max(plan.beams)
    far: list[list[str]] = []  # documents of every query, of the widest walk

    def keep_widest(walk: Walk) -> None:
        if walk.beam == widest:
            far.extend([hit.id for hit in hits] for hits in walk.hits)

    with closing(open_bundle(path)) as bundle:
        offered = bundle.manifest.model.scorings
    alone = "generative" if "generative" in offered else "geometric"
    settings = Settings(
        scorings=(alone,), rankings=RANKED, beams=plan.beams, limit=plan.queries, free_queries=200, words=False
    )
    compared = evaluate(path, folder, settings, keep_widest)
    rows = [*compared.rows]
    if others := tuple(scoring for scoring in offered if scoring != alone):
        narrower = tuple(beam for beam in plan.beams if beam != widest) or plan.beams
        rest = replace(settings, scorings=others, beams=narrower, baselines=False, codes=False)
        rows += evaluate(path, folder, rest).rows
    with closing(Pipeline(open_bundle(path))) as pipeline:
        history = pipeline.bundle.manifest.model.text.history_count
        dataset = load_dataset(folder, [*train_splits(folder), settings.split], history=history)
        task = make_task(dataset, settings, pipeline.bundle)
        asked = {d.id: int(n) for d, n in zip(dataset.documents, dataset.popularity(), strict=True)}
        deep = {alone: measure_far_down(dict(zip(task.ids, far, strict=True)), task, asked)}
        given = measure_given_first(pipeline, first_queries(task, GIVEN_QUERIES), alone, BEAM)
    sids = report_sids(load_sids(path), asked).as_json()
    for level in sids["levels"]:
        del level["counts"]  # a number for every code
    counts = {"documents": compared.documents, "queries": compared.queries}
    return counts | {"rows": [asdict(row) for row in rows], "sids": sids, "deep": deep, "given": given}


def measure_far_down(run: dict[str, list[str]], task: Task, asked: dict[str, int]) -> dict[str, Any]:
    """Recall far down, items a query, head and tail, and hits by how often train queries ask for a document."""
    ids = [document.id for document in task.documents]
    position = {document: place for place, document in enumerate(ids)}
    found = measure_deep(run, task.qrels, scaled_depths(len(ids)))
    parts = split_qrels(task.qrels, head_documents(asked, ids, HEAD_SHARE))
    pairs = [(query, document) for query, grades in task.qrels.items() for document in grades if grades[document] > 0]
    buckets = hits_by_popularity(
        np.asarray([asked[document] for document in ids]),
        np.asarray([position[document] for _, document in pairs]),
        np.asarray([document in run[query][:HIT_DEPTH] for query, document in pairs]),
    )
    return {
        "recall": {str(depth): value for depth, value in found.recall.items()},
        "retrieved": found.retrieved,
        "parts": {name: measure(run, qrels) for name, qrels in parts.items() if qrels},
        "buckets": [asdict(bucket) for bucket in buckets],
    }


def keep_if_same(run: Path, print_: str) -> bool:
    """Make a run's folder bear a fingerprint; a run with another is removed. Says whether one was kept."""
    mark = run / "fingerprint"
    if mark.is_file() and mark.read_text() == print_:
        return True
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    mark.write_text(print_)
    return False


def read_result(job: Job, figures: Path) -> dict[str, Any] | None:
    """Return a cell's figures, unless there are none, or what they rest on has changed since."""
    path = job.place.file(figures)
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result if result["fingerprint"] == job.figures else None


def collect(jobs: Sequence[Job], figures: Path) -> dict[str, Any]:
    """Gather all figures that hold: data set → cell → seed."""
    found: dict[str, Any] = {}
    for job in jobs:
        if result := read_result(job, figures):
            found.setdefault(job.place.data, {}).setdefault(job.place.cell.name, {})[str(job.place.seed)] = result
    return found


def _load(folder: Path, recipe: Recipe) -> Dataset:
    return load_dataset(folder, splits=train_splits(folder), history=recipe.text.history_count)
