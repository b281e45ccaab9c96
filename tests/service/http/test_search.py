from __future__ import annotations

import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.http.app import create_app
from service.model.tokens import TextError
from service.ops.settings import Settings
from tests.service.http.fakes import DOCUMENTS, FakePipeline, client_of, make_settings


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
async def client(pipeline: FakePipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(pipeline, make_settings(max_queries=8, max_query_characters=1000))) as client:
        pipeline.searches.clear()
        yield client


async def test_query_gives_results(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/search", json={"query": "count things", "top_k": 2})
    assert answer.status_code == 200
    body = answer.json()
    assert body["results"] == [
        {"id": "collections.Counter", "score": 0.0, "title": "Counter"},
        {"id": "a/path/with spaces?&#", "score": -1.0},
    ]
    assert body["cached"] is False
    assert body["timings"]["encode"] == 0.002
    assert body["timings"]["total"] > 0
    assert set(body) == {"results", "cached", "timings"}


async def test_batch_gives_answers_in_order(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    answer = await client.post("/v1/search", json={"queries": ["one", "two", "one"], "top_k": 1})
    assert [len(each["results"]) for each in answer.json()["answers"]] == [1, 1, 1]
    assert pipeline.searches[0][0] == ["one", "two"], "a repeated question is computed once"


async def test_options_reach_the_pipeline(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    body = {
        "query": "x",
        "top_k": 7,
        "beam_width": 33,
        "scoring": "generative",
        "ranking": "fused",
        "history": ["a", "b"],
    }
    assert (await client.post("/v1/search", json=body)).status_code == 200
    queries, options, histories = pipeline.searches[0]
    assert (queries, histories) == (["x"], [["a", "b"]])
    assert (options.top_k, options.beam_width, options.scoring, options.ranking) == (7, 33, "generative", "fused")


async def test_what_is_null_is_left_out(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    """A client that sends every field of the page, with the page's defaults, is answered like one that sends none."""
    page = (await client.get("/openapi.json")).json()["components"]["schemas"]["SearchRequest"]["properties"]
    defaults = {name: field.get("default") for name, field in page.items() if name not in ("include", "query")}
    assert (await client.post("/v1/search", json={"query": "x"} | defaults)).status_code == 200
    assert (await client.post("/v1/search", json={"query": "x"})).json()["cached"]
    assert len(pipeline.searches) == 1


async def test_a_text_that_the_model_cannot_encode_is_a_422(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    pipeline.error = TextError("query 0", "has no tokens for this model's tokenizer: give it a word")
    answer = await client.post("/v1/search", json={"query": "\u0301"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"] == "a text has no tokens for this model's tokenizer: give it a word"


async def test_a_batch_is_bounded_by_the_beams_that_it_walks() -> None:
    """Also where the request leaves the width out."""
    async with client_of(create_app(FakePipeline(), make_settings(max_queries=200))) as client:
        for queries, status in ((163, 200), (164, 422)):
            answer = await client.post("/v1/search", json={"queries": ["x"] * queries, "scoring": "geometric"})
            assert answer.status_code == status
    assert "100 for each of 164 queries, together more than 16384" in answer.text


@pytest.mark.parametrize(("mode", "status"), [("lexical", 200), ("generative", 422)])
async def test_a_batch_that_walks_nothing_has_no_beams(mode: str, status: int) -> None:
    pipeline = FakePipeline()
    pipeline.words = object()
    async with client_of(create_app(pipeline, make_settings(max_queries=1000))) as client:
        answer = await client.post("/v1/search", json={"queries": ["x"] * 820, "mode": mode})  # of 20 beams each
    assert answer.status_code == status


async def test_histories_belong_to_their_queries(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    body = {"queries": ["x", "y"], "histories": [["a"], []]}
    assert (await client.post("/v1/search", json=body)).status_code == 200
    assert pipeline.searches[0][2] == [["a"], []]


async def test_scoring_left_out_is_the_bundles_default(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    await client.post("/v1/search", json={"query": "x"})
    assert pipeline.searches[0][1].scoring == pipeline.bundle.manifest.model.default_scoring


async def test_include_gives_the_parts_asked_for(client: httpx.AsyncClient) -> None:
    body = {"query": "x", "top_k": 1, "scoring": "generative", "include": ["documents", "codes", "scores"]}
    (result,) = (await client.post("/v1/search", json=body)).json()["results"]
    assert result == {
        "id": "collections.Counter",
        "score": 0.0,
        "title": "Counter",
        "text": "Dict subclass for counting.",
        "metadata": {"kind": "class"},
        "codes": [0, 1, 2],
        "scores": {"cosine": 0.5, "log_probability": 0.0},
    }


@pytest.mark.parametrize("scoring", ["geometric", "guided"])
async def test_scores_that_hold_a_cosine_are_no_probability(client: httpx.AsyncClient, scoring: str) -> None:
    body = {"query": "x", "top_k": 1, "scoring": scoring, "include": ["scores"]}
    (result,) = (await client.post("/v1/search", json=body)).json()["results"]
    assert result["scores"] == {"cosine": 0.5}


async def test_beam_left_out_grows_with_top_k(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    await client.post("/v1/search", json={"query": "x", "top_k": 50})
    assert pipeline.searches[0][1].beams("guided") == 50
    await client.post("/v1/search", json={"query": "x", "top_k": 50, "beam_width": 20})
    assert pipeline.searches[1][1].beams("guided") == 20


async def test_headers_carry_times_and_request_id(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/search", json={"query": "x"}, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert float(answer.headers["x-pipeline-seconds"]) > 0
    assert "encode;dur=2.000" in answer.headers["server-timing"]
    assert answer.headers["x-cache"] == "miss"
    odd = await client.post("/v1/search", json={"query": "x"}, headers={"x-request-id": "a" * 200})
    assert len(odd.headers["x-request-id"]) == 16


# ---------------------------------------------------------------- the cache


async def test_second_time_comes_from_the_cache(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    first = await client.post("/v1/search", json={"query": "x", "include": ["documents"]})
    second = await client.post("/v1/search", json={"query": "x", "include": ["documents"]})
    assert second.json()["results"] == first.json()["results"]
    assert (second.json()["cached"], second.headers["x-cache"]) == (True, "hit")
    assert len(pipeline.searches) == 1
    batch = await client.post("/v1/search", json={"queries": ["y", "x"], "include": ["documents"]})
    assert [each["cached"] for each in batch.json()["answers"]] == [False, True]
    assert batch.headers["x-cache"] == "partial"
    assert pipeline.searches[1][0] == ["y"]


@pytest.mark.parametrize(
    "other",
    [
        {"query": "y"},
        {"top_k": 3},
        {"beam_width": 5},
        {"scoring": "geometric"},
        {"ranking": "cosine"},
        {"history": ["x"]},
        {"history": []},
        {"include": ["codes"]},
    ],
)
async def test_whatever_changes_the_answer_changes_the_key(
    client: httpx.AsyncClient, pipeline: FakePipeline, other: dict[str, Any]
) -> None:
    await client.post("/v1/search", json={"query": "x"})
    answer = await client.post("/v1/search", json={"query": "x"} | other)
    is_same = other == {"history": []}  # no history, whichever way it is said
    assert answer.json()["cached"] is is_same
    assert len(pipeline.searches) == (1 if is_same else 2)


async def test_other_history_is_another_question(client: httpx.AsyncClient) -> None:
    for history in (["a", "b"], ["b", "a"], ["ab", "c"], ["a b"]):
        answer = await client.post("/v1/search", json={"query": "x", "history": history})
        assert answer.json()["cached"] is False
    again = await client.post("/v1/search", json={"query": "x", "history": ["b", "a"]})
    assert again.json()["cached"] is True


async def test_key_does_not_depend_on_composition(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    await client.post("/v1/search", json={"query": "caf\u00e9"})
    answer = await client.post("/v1/search", json={"query": "cafe\u0301"})
    assert answer.json()["cached"] is True


async def test_explain_bypasses_the_cache(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    for _ in range(2):
        answer = await client.post("/v1/search", json={"query": "x", "explain": True})
        assert answer.json()["explanation"]["beams"][0]["codes"]
    assert len(pipeline.searches) == 2


async def test_wrong_values_in_the_cache_are_misses(pipeline: FakePipeline) -> None:
    """Truncated JSON, another schema, and another question's answer under our key."""
    app = create_app(pipeline, make_settings())
    async with client_of(app) as client:
        cache = app.state.shared.engine.cache
        await client.post("/v1/search", json={"query": "x"})
        ((key, (expires, value)),) = cache._entries.items()
        for bad in (value[:-3], b"", b"null", b"[]", json.dumps({"key": key, "results": [{"id": 1}]}).encode()):
            cache._entries[key] = (expires, bad)
            assert (await client.post("/v1/search", json={"query": "x"})).json()["cached"] is False
        cache._entries[key] = (expires, value.replace(key.encode(), b"0" * 64))
        assert (await client.post("/v1/search", json={"query": "x"})).json()["cached"] is False
        cache._entries[key] = (expires, value)
        assert (await client.post("/v1/search", json={"query": "x"})).json()["cached"] is True


async def test_cache_can_be_turned_off(pipeline: FakePipeline) -> None:
    async with client_of(create_app(pipeline, make_settings(cache_entries=0))) as client:
        for _ in range(2):
            assert (await client.post("/v1/search", json={"query": "x"})).json()["cached"] is False


# ---------------------------------------------------------------- the other endpoints


@pytest.mark.parametrize("document", DOCUMENTS)
async def test_document_by_id_with_slashes_and_signs(client: httpx.AsyncClient, document: Any) -> None:
    for safe in ("", "/"):
        answer = await client.get(f"/v1/documents/{urllib.parse.quote(document.id, safe=safe)}")
        assert answer.status_code == 200
        assert answer.json()["id"] == document.id
        assert answer.json()["metadata"] == document.metadata


@pytest.mark.parametrize("path", ["nothing", "%00", "%ff%fe", "a" * 5000, "%ED%A0%80"])
async def test_unknown_document_is_a_404_that_says_nothing_about_it(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/v1/documents/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert path not in answer.text


async def test_info_says_what_is_served(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert (info["documents"], info["level_sizes"], info["default_scoring"]) == (3, [8, 8, 8], "guided")
    assert (info["max_queries"], info["max_embedding_inputs"]) == (8, 2048)


async def test_info_names_every_limit_of_the_operator() -> None:
    limits = {
        "max_queries": 8, "max_query_characters": 900, "max_top_k": 70, "max_hamming_top_k": 600,
        "max_embedding_inputs": 50,
    }  # fmt: skip
    async with client_of(create_app(FakePipeline(), make_settings(**limits))) as client:
        info = (await client.get("/info")).json()
    assert {name: info[name] for name in limits} == limits


async def test_unknown_path_and_method_are_problems(client: httpx.AsyncClient) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/v1/search", 405), ("DELETE", "/info", 405)]:
        answer = await client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert answer.json()["status"] == status


async def test_openapi_has_examples_that_the_service_accepts(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    pipeline.words = object()  # one example asks for words
    page = (await client.get("/openapi.json")).json()
    content = page["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 3
    for example in content["examples"].values():
        assert (await client.post("/v1/search", json=example["value"])).status_code == 200
    assert {"400", "413", "415", "422", "503"} <= set(page["paths"]["/v1/search"]["post"]["responses"])
    assert set(page["paths"]["/v1/search"]["post"]["responses"]["422"]["content"]) == {"application/problem+json"}
    assert "422" not in page["paths"]["/v1/documents/{document_id}"]["get"]["responses"]
    assert "HTTPValidationError" not in json.dumps(page)
    assert {"/livez", "/readyz", "/info", "/metrics", "/v1/documents/{document_id}"} <= set(page["paths"])


async def test_metrics_use_templates_and_seconds(client: httpx.AsyncClient) -> None:
    await client.post("/v1/search", json={"query": "x"})
    await client.post("/v1/search", json={"query": "x"})
    await client.post("/v1/search", json={"query": ""})
    await client.get("/v1/documents/collections.Counter")
    await client.get("/made/up/by/a/client")
    text = (await client.get("/metrics")).text
    assert 'rhumb_request_seconds_count{route="/v1/search",status="200"} 2.0' in text
    assert 'rhumb_request_seconds_count{route="/v1/search",status="422"} 1.0' in text
    assert 'rhumb_request_seconds_count{route="/v1/documents/{document_id:path}",status="200"} 1.0' in text
    assert 'rhumb_request_seconds_count{route="unmatched",status="404"} 1.0' in text
    assert 'rhumb_stage_seconds_sum{stage="encode"} 0.002' in text
    assert 'rhumb_cache_lookups_total{outcome="hit"} 1.0' in text
    assert "made/up" not in text


async def test_metrics_port_takes_metrics_off_the_api(pipeline: FakePipeline, unused_tcp_port: int) -> None:
    settings: Settings = make_settings(metrics_port=unused_tcp_port)
    async with client_of(create_app(pipeline, settings)) as client:
        assert (await client.get("/metrics")).status_code == 404
        async with httpx.AsyncClient() as outside:
            answer = await outside.get(f"http://127.0.0.1:{unused_tcp_port}/metrics")
        assert "rhumb_ready 1.0" in answer.text
