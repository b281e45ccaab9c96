"""What a study measures of a bundle: its SIDs, retrieval by every scoring, far down, and by part of the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data import Qrels, load_dataset
from models.evaluate import Walk, evaluate
from models.measures import measure
from models.measures_deep import head_documents, measure_deep, scaled_depths, split_qrels
from models.popularity import hits_by_popularity
from models.quantizers.quality import HEAD_SHARE
from models.quantizers.report import load_sids, report_sids
from models.retriever.train import train_splits
from models.study.claims import BEAM, FREE_QUERIES, GIVEN_QUERIES
from models.study.given import measure_given_first
from models.study.plan import Plan
from models.task import SAMPLED, Settings, Task, first_queries, make_task
from service.index.bundle import open_bundle
from service.search.pipeline import Pipeline

MEASUREMENT = 2  # raise it when figures are measured in another way: those that are there are measured again
HEAD_CODES_HOLD = 0.5  # of the documents (Hourglass, table 1, does not say)
RANKED = ("lexicographic", "fused", SAMPLED)  # orders of a walk's candidates that are measured
HIT_DEPTH = 10  # of hits by popularity


def measure_bundle(path: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """All figures of a bundle: its SIDs, retrieval by every scoring, deep measures, head and tail.

    The widest beam, of which the deep measures are, is walked by the decoder alone: it costs more than all others.
    """
    widest, usual = max(plan.beams), min(plan.beams, key=lambda beam: abs(beam - BEAM))
    found: dict[int, list[list[str]]] = {}  # documents of every query, by beam

    def keep(walk: Walk) -> None:
        found[walk.beam] = [[hit.id for hit in hits] for hits in walk.hits]

    with closing(open_bundle(path)) as bundle:
        offered = bundle.manifest.model.scorings
    alone = "generative" if "generative" in offered else "geometric"
    settings = Settings(
        scorings=(alone,), rankings=RANKED, beams=plan.beams, limit=plan.queries, free_queries=FREE_QUERIES, words=False
    )
    compared = evaluate(path, folder, settings, keep)
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
        sids = load_sids(path)
        far = dict(zip(task.ids, found[widest], strict=True))
        deep = {alone: measure_far_down(far, task, asked, parts_of(task, asked, sids.codes))}
        few = first_queries(task, GIVEN_QUERIES)
        given = measure_given_first(pipeline, few, alone, usual)
        same = measure(dict(zip(task.ids, found[usual], strict=True)), few.qrels)
    quality = report_sids(sids, asked).as_json()
    for level in quality["levels"]:
        del level["counts"]  # a number for every code
    counts = {"documents": compared.documents, "queries": compared.queries}
    walked = {"rows": [asdict(row) for row in rows], "deep": deep, "given": given, "same": same}
    return counts | walked | {"sids": quality}


def parts_of(task: Task, asked: dict[str, int], codes_NL: NDArray[np.integer[Any]]) -> dict[str, Qrels]:
    """Split the judgements by their document: head and tail, by interactions; head code and tail code, by level 2.

    Head codes are those of level 2 with most documents that hold half of them together. A document that has no code
    there has lost one that was among the most frequent, and all of these count as one code.
    """
    ids = [document.id for document in task.documents]
    parts = split_qrels(task.qrels, head_documents(asked, ids, HEAD_SHARE))
    if codes_NL.shape[1] > 1:
        _, code_N, counts = np.unique(codes_NL[:, 1], return_inverse=True, return_counts=True)
        crowd = dict(zip(ids, counts[code_N].tolist(), strict=True))
        by_code = split_qrels(task.qrels, head_documents(crowd, ids, HEAD_CODES_HOLD))
        parts |= {f"{name} code": qrels for name, qrels in by_code.items()}
    return parts


def measure_far_down(
    run: dict[str, list[str]], task: Task, asked: dict[str, int], parts: Mapping[str, Qrels]
) -> dict[str, Any]:
    """Recall far down, items a query, the same by part, and hits by how often train queries ask for a document."""
    ids = [document.id for document in task.documents]
    position = {document: place for place, document in enumerate(ids)}
    depths = scaled_depths(len(ids))
    found = measure_deep(run, task.qrels, depths)
    pairs = [(query, document) for query, grades in task.qrels.items() for document in grades if grades[document] > 0]
    buckets = hits_by_popularity(
        np.asarray([asked[document] for document in ids]),
        np.asarray([position[document] for _, document in pairs]),
        np.asarray([document in run[query][:HIT_DEPTH] for query, document in pairs]),
    )
    return {
        "recall": {str(depth): value for depth, value in found.recall.items()},
        "retrieved": found.retrieved,
        "parts": {name: measure_part(run, qrels, depths) for name, qrels in parts.items() if judged(qrels)},
        "buckets": [asdict(bucket) for bucket in buckets],
    }


def measure_part(run: dict[str, list[str]], qrels: Qrels, depths: Sequence[int]) -> dict[str, float]:
    """The usual measures of some judgements, with recall at the last depth (`deepest`), items a query, and queries."""
    found = measure_deep(run, qrels, depths)
    more = {"deepest": found.recall[max(depths)], "retrieved": found.retrieved, "queries": float(found.queries)}
    return measure(run, qrels) | more


def judged(qrels: Qrels) -> bool:
    """Whether some document is relevant to some query."""
    return any(grade > 0 for grades in qrels.values() for grade in grades.values())
