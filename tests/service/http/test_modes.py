"""Modes and filters of `/v1/search` over a bundle with packed codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.http.app import create_app
from service.index.bundle import open_bundle
from service.search.options import SearchOptions
from service.search.pipeline import Pipeline
from tests.service.http.fakes import make_settings
from tests.tiny import make_bundle

QUERY = "captain of the northern reef"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(open_bundle(make_bundle(tmp_path_factory.mktemp("modes") / "bundle", code_levels=("1", "2"))), 1)


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[TestClient]:
    with TestClient(create_app(pipeline, make_settings())) as client:
        yield client


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/search", json={"query": QUERY, "top_k": 6} | body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@pytest.mark.parametrize("mode", ["generative", "hamming", "lexical", "hybrid"])
@pytest.mark.parametrize("level", [None, "2"])
def test_http_says_what_the_pipeline_says(client: TestClient, pipeline: Pipeline, mode: Any, level: str | None) -> None:
    level = level if mode in ("hamming", "hybrid") else None
    got = ask(client, mode=mode, include=["scores", "codes"], **({"level": level} if level else {}))
    (expected,) = pipeline.search([QUERY], SearchOptions(6, mode=mode, level=level))
    assert [result["id"] for result in got["results"]] == [hit.id for hit in expected.hits]
    assert [result["score"] for result in got["results"]] == pytest.approx([hit.score for hit in expected.hits])
    for result, hit in zip(got["results"], expected.hits, strict=True):
        assert result["codes"] == list(hit.sid)
        assert ("log_probability" in result["scores"]) is False, "guided scores are no probabilities"
        assert ("lexical" in result["scores"]) is (mode in ("lexical", "hybrid"))
    assert got["results"]
    assert ("hamming" in got["timings"]) is (mode in ("hamming", "hybrid")) or got["cached"]
    assert ("lexical" in got["timings"]) is (mode in ("lexical", "hybrid")) or got["cached"]


def test_mode_level_and_filter_are_part_of_the_cache_key(client: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"mode": "hamming"},
        {"mode": "hybrid"},
        {"mode": "hybrid", "level": "2"},
        {"mode": "hybrid", "lexical_weight": 0.7},
        {"mode": "lexical"},
        {"filter": {"ids": ["d1", "d2"]}},
        {"filter": {"ids": ["d1", "d3"]}},
    ]
    for body in bodies:
        assert ask(client, query="a question of its own", **body)["cached"] is False
    for body in bodies:
        assert ask(client, query="a question of its own", **body)["cached"] is True
    same = {"filter": {"ids": ["d2", "d1", "d1"]}}
    assert ask(client, query="a question of its own", **same)["cached"] is True


@pytest.mark.parametrize("mode", ["generative", "hamming", "hybrid"])
def test_only_documents_of_the_filter_are_found(client: TestClient, mode: str) -> None:
    got = ask(client, mode=mode, filter={"ids": ["d5", "d44", "d21"]})
    assert sorted(result["id"] for result in got["results"]) == ["d21", "d44", "d5"]


def test_lexical_finds_only_documents_with_a_word_of_the_query(client: TestClient, pipeline: Pipeline) -> None:
    allowed = {"ids": ["d5", "d44", "d21"]}
    got = ask(client, query="keel", mode="lexical", filter=allowed)
    holding = {document for document in allowed["ids"] if "keel" in text_of(pipeline, document).split()}
    assert {result["id"] for result in got["results"]} == holding
    assert ask(client, query="unheard of", mode="lexical")["results"] == []


def text_of(pipeline: Pipeline, document: str) -> str:
    position = pipeline.bundle.documents.by_id(document)
    assert position is not None
    return pipeline.bundle.documents.get(position).text


def test_info_says_which_modes_there_are(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info["modes"] == ["generative", "hamming", "lexical", "hybrid"]
    assert info["lexical_weight"] == 0.3


def test_hybrid_by_cosine_leaves_words_out(client: TestClient) -> None:
    by_cosine = ask(client, mode="hybrid", ranking="cosine", include=["scores"])
    assert all("lexical" not in result["scores"] for result in by_cosine["results"])
    unguided = ask(client, mode="hybrid", lexical_weight=0, scoring="geometric", include=["scores"])
    assert {result["id"]: result["scores"]["cosine"] for result in by_cosine["results"]}.items() <= {
        hit["id"]: hit["scores"]["cosine"] for hit in unguided["results"]
    }.items()
    assert [result["score"] for result in by_cosine["results"]] == [
        result["scores"]["cosine"] for result in by_cosine["results"]
    ]


def test_a_bundle_with_words_only_joins_them(tmp_path: Path) -> None:
    with TestClient(create_app(Pipeline(open_bundle(make_bundle(tmp_path / "words")), 1), make_settings())) as client:
        assert client.get("/info").json()["modes"] == ["generative", "lexical", "hybrid"]
        assert ask(client, mode="hybrid")["results"]
        for body, pointer in (
            ({"level": "1"}, "#/level"),
            ({"lexical_weight": 0}, "#/mode"),
            ({"ranking": "cosine"}, "#/mode"),
        ):
            answer = client.post("/v1/search", json={"query": "x", "mode": "hybrid"} | body)
            assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer.text


def test_hybrid_explains_its_beams(client: TestClient) -> None:
    assert ask(client, mode="hybrid", explain=True, scoring="generative", beam_width=3)["explanation"]["beams"]


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"mode": "both"}, "#/mode", "'generative', 'hamming', 'lexical' or 'hybrid'"),
        ({"mode": "hamming", "level": "1.5"}, "#/level", "no codes of level 1.5: choose from 1, 2"),
        ({"level": "1"}, "#/level", "does nothing in mode generative: leave it out"),
        ({"lexical_weight": 0.5}, "#/lexical_weight", "does nothing in mode generative: leave it out"),
        ({"mode": "hybrid", "lexical_weight": -1}, "#/lexical_weight", "0"),
        ({"mode": "hybrid", "lexical_weight": True}, "#/lexical_weight", "number"),
        ({"mode": "hybrid", "lexical_weight": 1e9}, "#/lexical_weight", "100"),
        ({"mode": "hybrid", "lexical_weight": 1, "ranking": "cosine"}, "#/lexical_weight", "leave out one"),
        ({"lexical_weight": 0}, "#/lexical_weight", "does nothing in mode generative: leave it out"),
        ({"mode": "lexical", "level": "1"}, "#/level", "leave it out"),
        ({"mode": "lexical", "beam_width": 5}, "#/beam_width", "leave it out"),
        ({"mode": "lexical", "ranking": "cosine"}, "#/ranking", "leave it out"),
        ({"mode": "hybrid", "ranking": "fused"}, "#/ranking", "does nothing in mode hybrid: leave it out"),
        ({"mode": "hamming", "ranking": "lexicographic"}, "#/ranking", "leave it out"),
        ({"mode": "hamming", "beam_width": 5}, "#/beam_width", "leave it out"),
        ({"mode": "hamming", "scoring": "guided"}, "#/scoring", "leave it out"),
        ({"mode": "hamming", "explain": True}, "#/explain", "leave it out"),
        ({"filter": {"ids": ["nobody"]}}, "#/filter/ids", "has 1 ids of 1 that no document has"),
        ({"filter": ["d1"]}, "#/filter", "object"),
    ],
)
def test_mistakes_are_named(client: TestClient, body: dict[str, Any], pointer: str, words: str) -> None:
    answer = client.post("/v1/search", json={"query": "x"} | body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["errors"][0]
    assert error["pointer"] == pointer
    assert words in error["detail"]


def test_saying_the_ranking_of_a_mode_asks_the_same_question(client: TestClient) -> None:
    first = ask(client, query="said and unsaid", mode="hamming")
    again = ask(client, query="said and unsaid", mode="hamming", ranking="cosine", explain=False)
    assert again["results"] == first["results"]
    assert (first["cached"], again["cached"]) == (False, True)


def test_metrics_have_the_scan_as_a_stage(client: TestClient) -> None:
    ask(client, query="something else entirely", mode="hybrid")
    text = client.get("/metrics").text
    for stage in ("encode", "walk", "hamming", "lexical", "rank"):
        assert f'rhumb_stage_seconds_count{{stage="{stage}"}}' in text
