"""Walks below a given first code, against the pipeline's own answers with everything else struck out."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from models.data import load_dataset
from models.study.given import measure_given_first
from models.task import Settings, make_task
from service.index.bundle import open_bundle
from service.search.pipeline import Pipeline, SearchOptions
from tests.tiny import make_bundle, make_documents


@pytest.mark.parametrize("scoring", ["generative", "geometric", "guided"])
def test_only_documents_with_the_right_first_code_are_found(tmp_path: Path, scoring: str) -> None:
    """With a beam that covers the tree, giving the code is the same as leaving out of the full answer what lacks it."""
    bundle = make_bundle(tmp_path / "bundle", level_sizes=(4, 4, 4))
    documents = make_documents()
    (tmp_path / "data/qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": d.id, "title": d.title, "text": d.text}) for d in documents]
    (tmp_path / "data/corpus.jsonl").write_text("\n".join(lines) + "\n")
    queries = [json.dumps({"_id": f"q{i}", "text": " ".join(documents[i].text.split()[:3])}) for i in range(8)]
    (tmp_path / "data/queries.jsonl").write_text("\n".join(queries) + "\n")
    (tmp_path / "data/qrels/test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(8)))
    with closing(Pipeline(open_bundle(bundle), threads=1)) as pipeline:
        task = make_task(load_dataset(tmp_path / "data", ["test"]), Settings(), pipeline.bundle)
        found = measure_given_first(pipeline, task, scoring, 100)
        options = SearchOptions(top_k=100, beam_width=100, scoring=scoring)  # type: ignore[arg-type]
        reciprocal = 0.0
        for query, answer in zip(task.ids, pipeline.search(task.texts, options), strict=True):
            (wanted,) = task.qrels[query]
            first = next(hit.sid[0] for hit in answer.hits if hit.id == wanted)
            kept = [hit.id for hit in answer.hits if hit.sid[0] == first]
            rank = kept.index(wanted) + 1
            reciprocal += (1 / rank if rank <= 10 else 0) / len(task.ids)
    assert found["MRR@10"] == pytest.approx(reciprocal)
