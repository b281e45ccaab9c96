"""Retrieval with the first code given (Hourglass, section 3.3): where does the path get lost, at its start or later?

Shapes: N documents, Q queries.
"""

from __future__ import annotations

import numpy as np

from models.measures import measure
from models.task import Task
from service.search.filters import DocumentFilter
from service.search.pipeline import Pipeline, SearchOptions


def measure_given_first(pipeline: Pipeline, task: Task, scoring: str, beam: int) -> dict[str, float]:
    """Measure a walk that may only go below the first code of the relevant document.

    A query with several relevant documents is given the code of the first in the bundle's order. Documents that share a
    first code lie side by side, so the code is a range of documents and the walk's filter.

    Returns:
        The mean of every measure of `models.measures.MEASURES`.
    """
    position = {document.id: row for row, document in enumerate(task.documents)}
    first_N = np.asarray(pipeline.bundle.trie.sids_NL[:, 0])
    documents, run = len(first_N), {}
    for row, query in enumerate(task.ids):
        wanted = min(position[document] for document, grade in task.qrels[query].items() if grade > 0)
        lo, hi = np.searchsorted(first_N, first_N[wanted], "left"), np.searchsorted(first_N, first_N[wanted], "right")
        eligible = DocumentFilter.from_positions(np.arange(lo, hi), documents)
        options = SearchOptions(top_k=100, beam_width=beam, scoring=scoring, eligible=eligible)
        (answer,) = pipeline.search([task.texts[row]], options, [task.histories[row]])
        run[query] = [hit.id for hit in answer.hits]
    return measure(run, task.qrels)
