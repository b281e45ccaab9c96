"""Modes and filters of `/v1/search` over a bundle with packed codes."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.mark.parametrize("mode", ["generative", "hamming", "hybrid"])
@pytest.mark.parametrize("level", [None, "2"])
def test_http_says_what_the_pipeline_says(client: TestClient, pipeline: Pipeline, mode: Any, level: str | None) -> None:
    level = None if mode == "generative" else level
    got = ask(client, mode=mode, include=["scores", "codes"], **({"level": level} if level else {}))
    (expected,) = pipeline.search([QUERY], SearchOptions(6, mode=mode, level=level))
    assert [result["id"] for result in got["results"]] == [hit.id for hit in expected.hits]
    assert [result["score"] for result in got["results"]] == pytest.approx([hit.score for hit in expected.hits])
    for result, hit in zip(got["results"], expected.hits, strict=True):
        assert result["codes"] == list(hit.sid)
        assert ("log_probability" in result["scores"]) is False, "guided scores are no probabilities"
    assert ("hamming" in got["timings"]) is (mode != "generative") or got["cached"]


def test_mode_level_and_filter_are_part_of_the_cache_key(client: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"mode": "hamming"},
        {"mode": "hybrid"},
        {"mode": "hybrid", "level": "2"},
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


def test_hybrid_explains_its_beams(client: TestClient) -> None:
    assert ask(client, mode="hybrid", explain=True, scoring="generative", beam_width=3)["explanation"]["beams"]


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"mode": "both"}, "#/mode", "'generative', 'hamming' or 'hybrid'"),
        ({"mode": "hamming", "level": "1.5"}, "#/level", "no codes of level 1.5: choose from 1, 2"),
        ({"level": "1"}, "#/level", "choose mode hamming or hybrid"),
        ({"mode": "hybrid", "ranking": "fused"}, "#/ranking", "ranks by cosine: leave it out"),
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
    for stage in ("encode", "walk", "hamming", "rank"):
        assert f'rhumb_stage_seconds_count{{stage="{stage}"}}' in text
