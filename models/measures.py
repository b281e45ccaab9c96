"""Item-level retrieval measures, by ir-measures.

R@k is recall: relevant documents among the first k over all relevant documents of the query. Means are over all judged
queries; a query without results counts as zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

from models.data import Qrels

MEASURES = ("R@1", "R@10", "R@100", "MRR@10", "nDCG@10")
DEPTH = 100  # results that the measures look at


def measure(run: Mapping[str, Sequence[str]], qrels: Qrels) -> dict[str, float]:
    """Measure a run.

    Args:
        run: query id → document ids, best first.
        qrels: query id → document id → grade; every query with a relevant document counts.

    Returns:
        The mean of every measure of `MEASURES`, 0 to 1.

    Raises:
        ValueError: no judged query, or a document twice in one result.
    """
    judged = {query: grades for query, grades in qrels.items() if max(grades.values(), default=0) > 0}
    if not judged:
        raise ValueError("no query has a relevant document: there is nothing to measure")
    for query, documents in run.items():
        if len(set(documents)) != len(documents):
            raise ValueError(f"query {query!r} has a document twice among its {len(documents)} results")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its providers warn about optional packages that are not needed
        import ir_measures
    names = {ir_measures.parse_measure(name.replace("MRR", "RR")): name for name in MEASURES}
    values = ir_measures.calc_aggregate(list(names), judged, _scored(run, judged))
    return {name: float(values[found]) for found, name in names.items()}


def _scored(run: Mapping[str, Sequence[str]], judged: Qrels) -> dict[str, dict[str, float]]:
    """Give every result minus its rank as score: the tool sorts by score and would break ties by id."""
    return {query: dict(_ranked(run.get(query, ()))) for query in judged}


def _ranked(documents: Sequence[str]) -> Iterator[tuple[str, float]]:
    for rank, document in enumerate(documents):
        yield document, -float(rank)
