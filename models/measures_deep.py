"""Measures of deep retrieval: items retrieved, recall far down, head and tail (SA2CRQ, section 3.1).

`models.measures` looks at the first 100 results; a system that groups documents under short SIDs is made for what comes
behind them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.data import DataError, Qrels
from models.popularity import head_mask
from service.search.options import MAX_TOP_K

PAPER_DEPTHS = (500, 1000, 2000)
DEEPEST_SHARE = 0.1  # of the corpus: a result list of more than this hardly selects

Run = Mapping[str, Sequence[str]]  # query id → document ids, best first


@dataclass(frozen=True)
class DeepMeasures:
    """Deep measures of one run.

    Attributes:
        queries: how many were judged.
        recall: depth → mean recall (R@500, R@1k and R@2k in the paper).
        retrieved: Ret-Per, items retrieved per query.
    """

    queries: int
    recall: dict[int, float]
    retrieved: float


def scaled_depths(documents: int) -> tuple[int, ...]:
    """Scale the depths 500, 1,000 and 2,000 to a corpus: in the same proportion, the last at most a tenth of it.

    And at most as many as an answer may hold: from 10,000 documents on they are half the paper's.

    Raises:
        DataError: a corpus too small for three depths.
    """
    deepest = min(PAPER_DEPTHS[-1], MAX_TOP_K, int(DEEPEST_SHARE * documents))
    depths = tuple(deepest * depth // PAPER_DEPTHS[-1] for depth in PAPER_DEPTHS)
    if depths[0] < 1:
        raise DataError(f"{documents} documents are too few for three depths: at least 40 are needed")
    return depths


def measure_deep(run: Run, qrels: Qrels, depths: Sequence[int]) -> DeepMeasures:
    """Measure a run over all queries that have a relevant document; one without results counts as zero.

    Args:
        run: query id → document ids, best first, each once.
        qrels: query id → document id → grade.
        depths: k of each recall.

    Raises:
        ValueError: no judged query, depths that are no positive numbers, or a document twice in one result.
    """
    relevant = {query: {d for d, grade in grades.items() if grade > 0} for query, grades in qrels.items()}
    judged = [query for query, documents in relevant.items() if documents]
    if not judged or not depths or min(depths) < 1:
        raise ValueError(
            f"{len(judged)} queries have a relevant document, depths are {list(depths)}: need some of both"
        )
    for query in judged:
        if len(set(run.get(query, ()))) != len(run.get(query, ())):
            raise ValueError(f"query {query!r} has a document twice among its {len(run[query])} results")
    recall = {
        depth: math.fsum(len(relevant[q].intersection(run.get(q, ())[:depth])) / len(relevant[q]) for q in judged)
        / len(judged)
        for depth in depths
    }
    return DeepMeasures(len(judged), recall, sum(len(run.get(query, ())) for query in judged) / len(judged))


def head_documents(interactions: Mapping[str, int], documents: Sequence[str], share: float) -> set[str]:
    """Give the head: about a `share` of the documents, those with most interactions (see `head_mask`).

    Args:
        interactions: document id → count; documents without one count zero.
        documents: all document ids.
        share: above 0 and below 1.

    Raises:
        ValueError: a share outside its range, or interactions of unknown documents.
    """
    known = set(documents)
    unknown = [document for document in interactions if document not in known]
    if unknown:
        raise ValueError(
            f"interactions name {len(unknown)} of {len(interactions)} documents that are not among the "
            f"{len(documents)} of the corpus, e.g. {', '.join(map(repr, unknown[:3]))}: count them on this corpus"
        )
    is_head_N = head_mask(np.array([interactions.get(document, 0) for document in documents]), share)
    return {document for document, is_head in zip(documents, is_head_N, strict=True) if is_head}


def split_qrels(qrels: Qrels, head: Collection[str]) -> dict[str, Qrels]:
    """Split judgements into "head" and "tail" by their document; a query with relevant documents of both is in both."""
    parts: dict[str, Qrels] = {"head": {}, "tail": {}}
    for query, grades in qrels.items():
        for document, grade in grades.items():
            parts["head" if document in head else "tail"].setdefault(query, {})[document] = grade
    return parts
