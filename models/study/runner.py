"""Runs a study: every cell is trained, indexed and measured once, and its figures are kept.

    out/DATA/encoder/             the tuned encoder that the cells of a data set share
    out/DATA/CELL/SEED/           a training; of one whose figures are there, the model that was measured
    figures/DATA/CELL/SEED.json   the figures, with the fingerprint of what they were measured on

A cell that is cut off goes on from its last epoch, and one that is to be measured otherwise is not trained again.
Figures are small: kept with the page that is made of them, they let a study go on where nothing else of it is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from rich.console import Console

from models.data import SEQUENCES, DataError, Dataset, load_dataset, vectors_file
from models.kept import keep_if_same, save_json
from models.lines import lines
from models.measures_deep import scaled_depths
from models.retriever.recipe import Recipe
from models.retriever.shelf import Shelf
from models.retriever.train import train, train_splits
from models.study.measuring import MEASUREMENT, RANKED, measure_bundle
from models.study.plan import Place, Plan, cell_recipe, encoder_recipe, places
from models.study.prints import cell_print, encoder_print, source_print
from service.index.build import build_bundle

console = Console(stderr=True)


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
    asked = (MEASUREMENT, plan.queries, plan.precision, *plan.beams, *RANKED)
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
    for split in ("train", "test"):
        if not (folder / "qrels" / f"{split}.tsv").is_file():
            raise DataError(
                f"{folder}: no qrels/{split}.tsv there: a study learns from train queries and asks test queries"
            )
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
    recipe, run, bundle = job.recipe, out / "run", out / "bundle"
    dataset = _load(folder, recipe)
    model = run / ("model" if plan.precision == "float32" else "model-int8")
    vectors = vectors_file(run, folder)
    if not (keep_if_same(run, job.model) and model.is_dir() and vectors.is_file()):
        train(recipe, [dataset], run, device, shelf=shelf)
    vectors_ND = np.load(vectors, allow_pickle=False)
    build_bundle(model, dataset.documents, bundle, vectors=vectors_ND, progress=False, replace=True, lexical=False)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    result = measure_bundle(bundle, folder, plan) | {"log": log, "made": made_by(device), "fingerprint": job.figures}
    save_json(figures, result)
    shutil.rmtree(bundle)
    for name in ("checkpoint.safetensors", "model", "model-int8"):
        if name != model.name:
            _remove(run / name)


def made_by(device: str) -> dict[str, str]:
    """What figures were made by: versions, device, and a fingerprint of the code itself."""
    return {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "device": device,
        "source": source_print(),
    }


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _load(folder: Path, recipe: Recipe) -> Dataset:
    return load_dataset(folder, splits=train_splits(folder), history=recipe.text.history_count)
