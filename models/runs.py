"""TREC runs: what a retrieval run writes for other tools to measure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from models.lines import DataError

Run = Mapping[str, Sequence[tuple[str, float]]]  # query id → (document id, score), best first


def write_run(path: Path | str, run: Run, tag: str) -> None:
    """Write a TREC run: `query Q0 document rank score tag`, one line a result.

    Tools that read runs sort by score and break ties by id, so equal scores are written a float32 step apart: the
    order of the file is the order of every reader.

    Raises:
        DataError: an id or tag that is empty or holds white space, or scores that rise or are NaN.
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for query, results in run.items():
            last, before = np.float32(np.inf), np.inf
            for rank, (document, score) in enumerate(results, start=1):
                _check_columns(query, document, tag)
                if not score <= before:
                    raise DataError(f"query {query!r}, rank {rank}: score {score} after {before}: not sorted")
                before = score
                last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{query} Q0 {document} {rank} {last:.9g} {tag}\n")


def _check_columns(*columns: str) -> None:
    for column in columns:
        if not column or re.search(r"\s", column):
            raise DataError(f"{column!r} cannot stand in a TREC run: empty or with white space")
