"""The real pipeline over a tiny bundle, on real sockets, against the pipeline asked directly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.index.bundle import open_bundle
from service.search.options import SearchOptions
from service.search.pipeline import Pipeline
from tests.service.http.fakes import running
from tests.tiny import make_bundle, make_documents

DOCUMENTS = {document.id: document for document in make_documents()}


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("http") / "bundle", history_count=2)


@pytest.fixture(scope="module")
def service(bundle_folder: Path) -> Iterator[str]:
    with running(Pipeline(open_bundle(bundle_folder), 1)) as (url, _, _):
        yield url


@pytest.fixture(scope="module")
def pipeline(bundle_folder: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(open_bundle(bundle_folder), 1)
    yield pipeline
    pipeline.close()


def ask(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/search", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@pytest.mark.parametrize(
    ("scoring", "ranking"),
    list(itertools.product(["generative", "geometric", "guided"], ["lexicographic", "cosine", "fused"])),
)
def test_http_says_what_the_pipeline_says(service: str, pipeline: Pipeline, scoring: str, ranking: Any) -> None:
    query, history = "north star over the reef", ["harbour", "tide"]
    got = ask(service, query=query, history=history, top_k=7, scoring=scoring, ranking=ranking, include=["codes"])
    (expected,) = pipeline.search([query], SearchOptions(7, scoring=scoring, ranking=ranking), [history])
    assert [result["id"] for result in got["results"]] == [hit.id for hit in expected.hits]
    assert [result["codes"] for result in got["results"]] == [list(hit.sid) for hit in expected.hits]
    assert [result["score"] for result in got["results"]] == pytest.approx([hit.score for hit in expected.hits])


def test_everything_that_can_be_included(service: str) -> None:
    got = ask(service, query="captain", top_k=3, scoring="generative", include=["documents", "codes", "scores"])
    for result in got["results"]:
        document = DOCUMENTS[result["id"]]
        assert (result["title"], result["text"]) == (document.title, document.text)
        assert result["metadata"] == document.metadata
        assert -1.001 <= result["scores"]["cosine"] <= 1.001
        assert result["scores"]["log_probability"] <= 0


def test_more_results_than_documents_gives_them_all(service: str) -> None:
    got = ask(service, query="captain", top_k=1000)
    assert sorted(result["id"] for result in got["results"]) == sorted(DOCUMENTS)


def test_batch_is_its_queries_one_by_one(service: str) -> None:
    queries = ["north", "a reef at low tide", "sailor sailor sailor"]
    batch = ask(service, queries=queries, top_k=4, scoring="guided", ranking="cosine")["answers"]
    for query, answer in zip(queries, batch, strict=True):
        alone = ask(service, query=query, top_k=4, scoring="guided", ranking="cosine")
        assert [result["id"] for result in answer["results"]] == [result["id"] for result in alone["results"]]


def test_explanation_adds_up(service: str) -> None:
    got = ask(service, query="a compass and a chart", scoring="generative", explain=True, beam_width=5)
    explanation = got["explanation"]
    assert explanation["decoder_steps"] >= 1
    assert 1 <= len(explanation["beams"]) <= 5
    for beam in explanation["beams"]:
        assert sum(beam["level_scores"]) == pytest.approx(beam["score"], abs=1e-4)
        assert len(beam["codes"]) == 3
    scores = [beam["score"] for beam in explanation["beams"]]
    assert scores == sorted(scores, reverse=True)
    assert ask(service, query="x", scoring="geometric", explain=True)["explanation"]["decoder_steps"] == 0


@pytest.mark.parametrize("query", ["☃", "🙂🙂", "مرحبا", "?!", "a" * 4000, "e\u0301" * 500, "[PAD] [SEP]", "\u0301"])
def test_odd_queries_find_something(service: str, query: str) -> None:
    assert ask(service, query=query)["results"]


def test_stored_documents_readiness_and_stage_metrics(service: str) -> None:
    answer = httpx.get(f"{service}/v1/documents/d7").json()
    assert (answer["title"], answer["metadata"]) == (DOCUMENTS["d7"].title, {"number": 7})
    assert httpx.get(f"{service}/readyz").status_code == 200
    ask(service, query="a query that is new")
    text = httpx.get(f"{service}/metrics").text
    for stage in ("encode", "decode", "walk", "rank", "documents", "queue", "render"):
        assert f'rhumb_stage_seconds_count{{stage="{stage}"}}' in text
    info = httpx.get(f"{service}/info").json()
    assert (info["documents"], info["scorings"]) == (60, ["generative", "geometric", "guided"])


def test_stages_lie_within_the_pipeline_and_that_within_the_whole(service: str) -> None:
    timings = ask(service, query="another new query")["timings"]
    stages = sum(timings[stage] for stage in ("encode", "decode", "walk", "rank", "documents"))
    assert 0 < stages <= timings["pipeline"] <= timings["total"]


def test_bundle_without_a_decoder_serves_geometric(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", decoder=False)
    with running(Pipeline(open_bundle(folder), 1)) as (url, _, _):
        assert ask(url, query="anchor")["results"]
        refused = httpx.post(f"{url}/v1/search", json={"query": "anchor", "scoring": "guided"})
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == "#/scoring"
        assert "geometric" in refused.json()["errors"][0]["detail"]
